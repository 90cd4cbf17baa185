import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from pandas import read_parquet
from scripts import python
from tiny import (
    PROMPTS,
    Gradients,
    assert_equal_runs,
    build,
    metrics,
    parameters,
    recorded,
    relative_difference,
    tiny_dataset,
    tiny_model,
    train,
)
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.dynamic_sampling import DynamicSampling
from opefo_trl.training.guards import NonFiniteError

SCRIPT = Path(__file__).parents[1] / "runs" / "resampled.py"
NUMBERED = Dataset.from_dict({"prompt": [PROMPTS[number % 8] for number in range(200)], "number": range(200)})
TIMES = ("time", "train_")  # in the names of metrics that measure time


def seven_of_ten_solved(completions, number, **_):
    """Solve 70 % of the prompts always; of the others, every other completion."""
    return [1.0 if prompt % 10 < 7 else float(index % 2) for index, prompt in enumerate(number)]


def sampled(out, trainer_class=OPEFOTrainer, config_class=OPEFOConfig, reward=seven_of_ten_solved, **overrides):
    """Train on rollouts of 8 groups of two."""
    extra = {"reward_funcs": reward, "train_dataset": NUMBERED, **overrides.pop("extra", {})}
    run = {"per_device_train_batch_size": 16, "num_generations": 2, "max_steps": 2, **overrides}
    return train(trainer_class, config_class, out, extra=extra, **run)


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_three_rounds_raise_the_share_of_rows_with_a_signal_from_03_to_09(out):
    rows = sampled(out, max_steps=30, resample_rounds=3).state.log_history[:30]
    assert mean(rows, "frac_reward_zero_std") == pytest.approx(0.7, abs=0.05)  # over all that was generated
    assert mean(rows, "batching/signal_share") >= 0.9
    assert mean(rows, "reward") == pytest.approx(0.7 + 0.3 / 2, abs=0.03)
    assert mean(rows, "batching/resampled_groups") > 10 and mean(rows, "batching/resample_time") > 0
    assert any(row["batching/surplus_groups"] for row in rows)


def test_without_a_group_to_replace_a_run_is_that_of_trl(out):
    def mixed(completions, **_):
        return [float(index % 2) for index in range(len(completions))]

    ours = sampled(out, reward=mixed, control="none", micro_batching="trl", resample_rounds=2)
    assert_equal_runs(ours, sampled(out, GRPOTrainer, GRPOConfig, reward=mixed))
    assert [row["batching/resampled_groups"] for row in ours.state.log_history[:2]] == [0, 0]


@pytest.mark.parametrize("scope", ["batch", "running"])
def test_the_update_is_that_of_a_rollout_of_exactly_these_rows(scope, out, monkeypatch):
    generate = DynamicSampling._generate

    def seeded(self, prompts):  # TRL shuffles the rows after this
        generated = generate(self, prompts)
        torch.manual_seed(5)
        return generated

    monkeypatch.setattr(DynamicSampling, "_generate", seeded)
    rollouts = recorded(monkeypatch, DynamicSampling, "_generate")
    gradings = recorded(monkeypatch, DynamicSampling, "_calculate_rewards")
    common = {"max_steps": 1, "flow_scope": scope, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    gradients, of_exactly = Gradients(), Gradients()
    fresh = sampled(out, resample_rounds=3, extra={"callbacks": [gradients]}, **common)
    (prompt_ids, completion_ids, *_), (inputs, prompts, *_) = rollouts[0][3], gradings[-1][1]
    assert len(gradings) > 2 and [row["prompt"] for row in inputs] == prompts

    replay = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}
    rows = NUMBERED.select([row["number"] for row in inputs[::2]])
    extra = {"rollout_func": lambda *_: dict(replay), "train_dataset": rows, "callbacks": [of_exactly]}
    exactly = sampled(out, shuffle_dataset=False, extra=extra, **common)
    # In one run generation measures the flow, in the other a scoring pass, which rounds otherwise
    assert relative_difference(gradients.last, of_exactly.last) < 1e-5
    ours, theirs = (trainer.state.log_history[0] for trainer in (fresh, exactly))
    for name in ("loss", "grad_norm", "flow/net", "flow/lambda", "flow/lambda_star", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    assert ours["batching/signal_share"] == 1 - theirs["frac_reward_zero_std"]


# ---- prompts


def dealt(trainer_inputs):
    return [row["number"] for row in trainer_inputs[::2]]


def test_prompts_come_in_the_order_of_trls_sampler(out, monkeypatch):
    gradings = recorded(monkeypatch, GRPOTrainer, "_calculate_rewards")
    trainer = sampled(out, resample_rounds=3)
    ours = [number for _, (inputs, *_), _, _ in gradings for number in dealt(inputs)]
    assert len(gradings) > 2
    order = list(build(GRPOTrainer, GRPOConfig, out, extra={"train_dataset": NUMBERED})._get_train_sampler())
    shown_again = sum(row["batching/surplus_groups"] for row in trainer.state.log_history[:1])
    assert shown_again == len(ours) - len(set(ours))
    assert list(dict.fromkeys(ours)) == list(dict.fromkeys(order))[: len(set(ours))]


def test_the_prompts_of_surplus_groups_come_first_in_the_next_rollout(out, monkeypatch):
    gradings = recorded(monkeypatch, GRPOTrainer, "_calculate_rewards")

    def flat_at_first(completions, number, **_):
        """Solve the first three prompts always; of all others, every other completion."""
        solved = set(dealt(gradings[0][1][0])[:3]) if gradings else set(number[:6])
        return [1.0 if prompt in solved else float(index % 2) for index, prompt in enumerate(number)]

    trainer = sampled(out, reward=flat_at_first, resample_rounds=1)
    first, fresh, second = (dealt(inputs) for _, (inputs, *_), _, _ in gradings)
    assert len(fresh) == 5  # 3 are missing, and 5 of 8 had a signal
    assert second[:2] == fresh[3:] and not set(second[2:]) & {*first, *fresh}
    assert [row["batching/surplus_groups"] for row in trainer.state.log_history[:2]] == [2, 0]


def saving(out, **overrides):
    return sampled(out, max_steps=4, save_strategy="steps", save_steps=2, resample_rounds=2, **overrides)


def test_a_resumed_run_continues_bit_for_bit(out):
    data = {"extra": {"train_dataset": NUMBERED.select(range(20))}}  # several passes over the data
    whole = saving(out / "whole", **data)
    state = json.loads((out / "whole" / "checkpoint-2" / "control_state.json").read_text())["prompts"]
    assert state["passes"] > 1
    extra = {"reward_funcs": seven_of_ten_solved, **data["extra"]}
    run = {"per_device_train_batch_size": 16, "num_generations": 2, "max_steps": 4, "resample_rounds": 2}
    resumed = build(OPEFOTrainer, OPEFOConfig, out / "resumed", extra=extra, **run)
    resumed.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-2"))
    assert resumed.prompt_order.state_dict() == whole.prompt_order.state_dict()
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name
    assert metrics(resumed, TIMES) == metrics(whole, TIMES)


def test_a_checkpoint_without_the_order_begins_with_the_first_prompt_and_says_so(out, caplog):
    sampled(out, save_strategy="steps", save_steps=1)
    run = {"per_device_train_batch_size": 16, "num_generations": 2, "max_steps": 3, "resample_rounds": 1}
    extra = {"reward_funcs": seven_of_ten_solved, "train_dataset": NUMBERED}
    resumed = build(OPEFOTrainer, OPEFOConfig, out, extra=extra, **run)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "`resample_rounds=0`" in caplog.text and resumed.prompt_order.passes == 1


# ---- which groups


@pytest.mark.parametrize(("keep", "kept"), [("informative", set()), ("all_right", {1.0}), ("all_wrong", {0.0})])
def test_groups_to_keep_are_not_replaced(keep, kept, out, monkeypatch):
    def by_prompt(completions, number, **_):
        """Solve a third of the prompts always and a third never."""
        return [[0.0, 1.0, float(index % 2)][prompt % 3] for index, prompt in enumerate(number)]

    rollouts = recorded(monkeypatch, OPEFOTrainer, "_generate_and_score_completions")
    sampled(out, reward=by_prompt, resample_rounds=8, resample_keep=keep, max_steps=4)
    groups = [group for *_, batch in rollouts for group in batch["reward"].view(-1, 2).tolist()]
    assert {low for low, high in groups if low == high} == kept
    assert any(low != high for low, high in groups)


def test_a_run_whose_prompts_are_all_solved_goes_on_without_a_signal(out):
    solved = sampled(out, reward=lambda completions, **_: [1.0] * len(completions), resample_rounds=2)
    row = solved.state.log_history[0]
    assert (row["batching/signal_share"], row["batching/resampled_groups"]) == (0, 16)
    assert row["grad_norm"] == 0


def test_an_infinite_reward_in_a_fresh_group_skips_the_step(out):
    def infinite_later(completions, number, trainer_state, **_):
        rewards = seven_of_ten_solved(completions, number)
        fresh = len(completions) < 16 and trainer_state.global_step == 0
        return [math.inf, *rewards[1:]] if fresh else rewards

    def plain(completions, number, trainer_state, **_):
        return seven_of_ten_solved(completions, number)

    order = {"shuffle_dataset": False, "resample_rounds": 1}  # the first prompts: 7 flat groups and one with a signal
    fewer = {**order, "extra": {"train_dataset": NUMBERED.select([7, 8, 9, 17, 18, 19, 0, 1, *range(20, 100)])}}
    with pytest.raises(NonFiniteError, match="infinity"):
        sampled(out, reward=infinite_later, **fewer)
    skipping = sampled(out, reward=infinite_later, nonfinite="skip", **fewer)
    assert [row["guard/skipped_steps"] for row in skipping.state.log_history[:2]] == [1, 1]
    assert sampled(out, reward=plain, nonfinite="skip", **fewer).state.log_history[1]["guard/skipped_steps"] == 0


class Doubled(OPEFOTrainer):
    """Changes rewards after they are graded."""

    def _calculate_rewards(self, *args):
        return 2 * super()._calculate_rewards(*args)


class Alone(OPEFOTrainer):
    """Grades by itself."""

    def _calculate_rewards(self, inputs, *args):
        return torch.tensor([[float(index % 2 * (row["number"] % 2))] for index, row in enumerate(inputs)])


@pytest.mark.parametrize(("trainer_class", "highest"), [(Doubled, 2.0), (Alone, 1.0)])
def test_a_subclass_may_change_the_rewards(trainer_class, highest, out):
    run = {"max_steps": 1, "resample_rounds": 3, "zero_advantage_tokens": "leave_out", "log_completions": True}
    row = sampled(out, trainer_class, **run).state.log_history[0]
    assert row["batching/signal_share"] > 0.5 and row["batching/resampled_groups"] > 0
    table = read_parquet(out / "completions" / "completions_00001.parquet")
    assert len(table) > 16 and table["seven_of_ten_solved"].max() == highest
    trained = table[~table["advantage"].isna()]
    assert trained["seven_of_ten_solved"].max() == highest and len(trained) == 16


# ---- what is logged


def test_tables_of_an_evaluation_hold_no_row_of_the_training(out):
    told = Dataset.from_dict({"prompt": PROMPTS[:4], "number": [1000, 1001, 1002, 1003]})
    run = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4, "per_device_eval_batch_size": 8}
    trainer = sampled(out, resample_rounds=2, max_steps=1, extra={"eval_dataset": told}, **run)
    prompts = Counter(trainer._logs["prompt"])
    assert prompts == dict.fromkeys(PROMPTS[:4], 4) and trainer._logs["prompt"].maxlen == 16


def test_metrics_and_tables_cover_all_that_was_generated(out, monkeypatch):
    gradings = recorded(monkeypatch, GRPOTrainer, "_calculate_rewards")

    def logged(completions, number, log_extra, log_metric, **_):
        log_extra("twice", [2 * prompt for prompt in number])
        log_metric("rows", len(number))
        return seven_of_ten_solved(completions, number)

    trainer = sampled(out, reward=logged, resample_rounds=2, max_steps=1)
    row, logs = trainer.state.log_history[0], trainer._logs
    made = [
        (prompt, completion, 2 * given["number"], reward, len(ids))
        for _, (inputs, prompts, completions, token_ids), _, rewards in gradings
        for prompt, completion, given, reward, ids in zip(
            prompts, completions, inputs, rewards.flatten().tolist(), token_ids, strict=True
        )
    ]
    assert len(made) > 30 and row["num_tokens"] == sum(len(entry[0]) + entry[4] for entry in made)
    (rewards,) = logs["rewards"].values()
    table = zip(logs["prompt"], logs["completion"], logs["extra"]["twice"], rewards, strict=True)
    assert Counter(table) == Counter(entry[:4] for entry in made)
    assert [math.isnan(advantage) for advantage in logs["advantages"]] == [False] * 16 + [True] * (len(made) - 16)

    values = torch.tensor([entry[3] for entry in made])
    lengths = torch.tensor([float(entry[4]) for entry in made])
    assert row["reward"] == pytest.approx(values.mean().item()) == pytest.approx(row["rewards/logged/mean"])
    assert row["reward_std"] == pytest.approx(values.std().item()) == pytest.approx(row["rewards/logged/std"])
    assert row["frac_reward_zero_std"] == pytest.approx((values.view(-1, 2).diff() == 0).float().mean().item())
    assert row["completions/mean_length"] == pytest.approx(lengths.mean().item())
    assert (row["completions/min_length"], row["completions/max_length"]) == (lengths.min(), lengths.max())
    assert row["answers/solved"] == pytest.approx((values.view(-1, 2).sum(1) > 0).float().mean().item())
    sizes = [len(inputs) for _, (inputs, *_), _, _ in gradings]
    assert row["rows"] == pytest.approx(sum(size**2 for size in sizes) / sum(sizes))


def test_what_vllm_has_sampled_travels_with_its_rows(out, monkeypatch):
    """Without vLLM: its log-probabilities are made from the tokens, as any engine's would be."""
    generate = GRPOTrainer._generate_single_turn

    def engine(self, *args, **kwargs):
        completion_ids, _ = generate(self, *args, **kwargs)
        return completion_ids, [[-float(token) for token in ids] for ids in completion_ids]

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", engine)
    batches = recorded(monkeypatch, OPEFOTrainer, "_generate_and_score_completions")
    sampled(out, resample_rounds=2, max_steps=1)
    batch = batches[0][3]
    sampling = batch["sampling_per_token_logps"]
    assert torch.equal(sampling, -(batch["completion_ids"] * batch["completion_mask"]).float())


# ---- what is refused


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"rollout_func": lambda prompts, trainer: {}}, "`rollout_func`"),
        ({"train_dataset": tiny_dataset().to_iterable_dataset()}, "IterableDataset"),
        ({"train_dataset": tiny_dataset().add_column("image", [None] * 64)}, "column 'image'"),
    ],
)
def test_what_cannot_be_sampled_again_is_refused_by_name(extra, named, out):
    with pytest.raises(ValueError, match=rf"`resample_rounds` above 0.*{named}.*`resample_rounds=0`"):
        build(OPEFOTrainer, OPEFOConfig, out, resample_rounds=1, extra=extra)
    build(OPEFOTrainer, OPEFOConfig, out, extra=extra)


def test_an_order_that_is_not_trls_is_refused(out):
    class Own(OPEFOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with pytest.raises(ValueError, match=r"RepeatSampler, not of a SequentialSampler"):
        build(Own, OPEFOConfig, out, resample_rounds=1)


# ---- the loss' denominator


def half_flat(completions, number, **_):
    return [float(index % 2) if prompt % 2 else 1.0 for index, prompt in enumerate(number)]


def own_gradient(batch, counted):
    """The gradient of - sum A log p / tokens of the counted rows, at the policy that sampled, without TRL."""
    model = tiny_model()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].size(1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    logps = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    tokens = batch["completion_mask"].double()
    total = -(logps.double() * batch["advantages"].double().unsqueeze(1) * tokens).sum()
    (total / tokens[counted].sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batching", ["exact", "trl"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("choice", ["count", "leave_out"])
def test_tokens_without_a_signal_count_or_not(choice, loss_type, micro_batching, out, monkeypatch):
    batches = recorded(monkeypatch, OPEFOTrainer, "_generate_and_score_completions")
    gradients = Gradients()
    sampled(
        out,
        reward=half_flat,
        control="none",
        loss_type=loss_type,
        micro_batching=micro_batching,
        zero_advantage_tokens=choice,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        epsilon_high=5.0,  # cispo's bound on the ratio itself
        extra={"callbacks": [gradients]},
    )
    batch = batches[0][3]
    flat = batch["reward"].view(-1, 2).diff().eq(0).expand(-1, 2).reshape(-1)
    assert 0 < flat.sum() < 16
    counted = ~flat if choice == "leave_out" else torch.ones(16, dtype=torch.bool)
    assert relative_difference(gradients.last, own_gradient(batch, counted)) < 1e-5


def test_rows_with_the_mean_reward_of_their_group_count(out, monkeypatch):
    """Their advantage is 0, but their group has a signal."""
    batches = recorded(monkeypatch, OPEFOTrainer, "_generate_and_score_completions")

    def thirds(completions, number, **_):
        return [index % 3 / 2 if prompt % 2 else 0.1 for index, prompt in enumerate(number)]

    run = {"num_generations": 3, "per_device_train_batch_size": 18, "max_steps": 1, "control": "none"}
    sampled(out, reward=thirds, zero_advantage_tokens="leave_out", **run)
    batch = batches[0][3]
    counted = (batch["reward"] != 0.1).unsqueeze(1)  # 0.1 is flat, though its mean over three is not 0.1 in float32
    assert batch["num_items_in_batch"] == (batch["completion_mask"] * counted).sum()
    assert (batch["advantages"] == 0).sum() > 0 and 0 < counted.sum() < 18


def test_rows_that_the_control_pushes_count(out, monkeypatch):
    batches = recorded(monkeypatch, OPEFOTrainer, "_generate_and_score_completions")
    sampled(out, reward=half_flat, zero_advantage_tokens="leave_out", flow_target=0.5, max_steps=1)
    batch = batches[0][3]
    assert batch["pushed"].any() and not batch["pushed"].all()
    flat = batch["reward"].view(-1, 2).diff().eq(0).expand(-1, 2).reshape(-1)
    counted = (~flat | batch["pushed"]).unsqueeze(1)
    assert batch["num_items_in_batch"] == (batch["completion_mask"] * counted).sum()


# ---- two processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Run the script on one process and on two, of which only the second has a group to replace at first."""
    out = tmp_path_factory.mktemp("processes")
    for count in (1, 2):
        python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, SCRIPT, out / str(count))
    return out


@pytest.mark.slow
def test_two_processes_of_which_one_needs_fresh_groups_do_not_hang_and_agree_with_one(processes):
    one, *two = (
        json.loads((processes / name).read_text()) for name in ("1/rank-0.json", "2/rank-0.json", "2/rank-1.json")
    )
    assert [one["world"], two[0]["world"]] == [1, 2]
    assert two[0]["flat_at_first"] == 0 and two[1]["flat_at_first"] > 0
    for first, second, both in zip(two[0]["trained"], two[1]["trained"], one["trained"], strict=True):
        assert first + second == both
    assert set(one["trained"][0]) == {"1+1=", "2*3=", "(1+2)*3="}
    assert two[0]["order"] == two[1]["order"] == one["order"]
    assert Counter(map(tuple, two[0]["table"])) == Counter(map(tuple, one["table"]))
    for name, value in one["metrics"].items():
        assert two[0]["metrics"][name] == pytest.approx(value, abs=1e-5), name
    assert one["metrics"]["batching/resampled_groups"] > 0 and one["metrics"]["batching/signal_share"] == 1
    assert relative_difference(*(torch.load(processes / name / "gradient.pt") for name in "21")) < 1e-5


@pytest.mark.slow
def test_rows_that_another_process_has_generated_bring_their_scores(processes):
    ranks = [json.loads((processes / f"2/rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(rank["moved"] for rank in ranks) > 0
    for rank in ranks:
        assert len(rank["gaps"]) == 2 and max(rank["gaps"]) < 1e-4
