"""Scores taken from generation are those of a scoring pass, and are left alone where they could not be."""

import pytest
import torch
from peft import LoraConfig
from tiny import PROMPTS, SIZES, build, digit_reward, parameters, recorded, scripted_rollout, tiny_model, train
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.generation_scores import GenerationScores

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64, init_lora_weights=False)


def flat_on_half(prompts, completions, **_):
    """Leave half of the prompts without a signal, so that their groups are replaced."""
    rewards = digit_reward(completions)
    return [0.5 if prompt in PROMPTS[::2] else reward for prompt, reward in zip(prompts, rewards, strict=True)]


ROLLOUTS = {
    "sampled": {},
    "exact": {"flow_estimator": "exact", "temperature": 0.7},
    "expected": {"flow_estimator": "expected"},
    "adapter": {"extra": {"peft_config": LORA}},
    "truncated sampling": {"top_k": 3, "repetition_penalty": 1.3},
    "checkpointing": {"gradient_checkpointing": True},
    "multiple": {"pad_to_multiple_of": 8},
    "truncated rows": {"mask_truncated_completions": True, "max_completion_length": 8},
    "fresh groups": {"resample_rounds": 2, "extra": {"reward_funcs": flat_on_half}},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_they_are_those_of_a_scoring_pass(rollout, out, monkeypatch, model_path):
    pairs = []

    def take(self, batch, mask, accelerator):
        scores = original(self, batch, mask, accelerator)
        logps = trainer._score(batch)
        pairs.append((scores, trainer.scoring.scores_of(logps), mask.bool()))
        return scores

    original = GenerationScores.take
    monkeypatch.setattr(GenerationScores, "take", take)
    run = {"max_steps": 2, "gradient_accumulation_steps": 2, **ROLLOUTS[rollout]}
    trainer = build(OPEFOTrainer, OPEFOConfig, out, model_path, **run)
    trainer.train()
    assert len(pairs) == 2
    near = 0.1 if "bf16" in run else 1e-4
    for ours, theirs, mask in pairs:
        assert mask.any() and not mask.all()  # rows differ in length
        for name in ("logps", "entropies", "vocabulary"):
            left, right = getattr(ours, name), getattr(theirs, name)
            assert (left is None) == (right is None) == (name == "vocabulary" and "flow_estimator" not in run)
            if left is not None:
                assert left.shape == mask.shape
                torch.testing.assert_close(left[mask], right[mask], atol=near, rtol=near)


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_the_flow_costs_no_forward(micro_batches, out, monkeypatch):
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    run = {"per_device_train_batch_size": 16 // micro_batches, "gradient_accumulation_steps": micro_batches}
    for estimator in ("sampled", "exact"):
        calls.clear()
        trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2, flow_estimator=estimator, **run)
        assert len(calls) == 2 * micro_batches
        assert all(row["flow/lambda"] != 0 for row in trainer.state.log_history if "flow/lambda" in row)


def test_turns_between_which_a_tool_wrote():
    model, rows = tiny_model().train(), [[4, 5], [7, 8, 9], [7, 8, 9], [4, 5]]
    scores = GenerationScores("exact", 0.7, None)

    def generate(prompts, images):
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        attention = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
        options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 5, "eos_token_id": None}
        sampled = model.generate(ids, attention_mask=attention, **options)[:, width:]
        return sampled.tolist(), None

    torch.manual_seed(0)
    completions, _ = scores.collect(generate, model, rows, None)
    tool, goes_on = [10, 11], [1, 3]
    masks = [[1] * 5 for _ in rows]
    contexts = [rows[row] + completions[row] + tool for row in goes_on]
    for row, more in zip(goes_on, scores.collect(generate, model, contexts, None)[0], strict=True):
        completions[row] = completions[row] + tool + more[:3]  # TRL cuts what is longer than a completion may be
        masks[row] += [0, 0, 1, 1, 1]
    width, prompts = max(map(len, completions)), max(map(len, rows))
    batch = {
        "prompt_ids": torch.tensor([[0] * (prompts - len(row)) + row for row in rows]),
        "prompt_mask": torch.tensor([[0] * (prompts - len(row)) + [1] * len(row) for row in rows]),
        "completion_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in completions]),
    }
    batch["tool_mask"] = mask = torch.tensor([row + [0] * (width - len(row)) for row in masks])
    trainer = type("OneRank", (), {"num_processes": 1})
    taken = scores.take(batch, mask, trainer)
    for row, (prompt, completion) in enumerate(zip(rows, completions, strict=True)):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].detach() / 0.7
        logps = logits.log_softmax(-1)
        trained = mask[row, : len(completion)].bool()
        expected = logps.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        entropies = -(logps.exp() * logps).sum(1)
        torch.testing.assert_close(taken.logps[row, : len(completion)][trained], expected[trained], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            taken.entropies[row, : len(completion)][trained], entropies[trained], atol=1e-4, rtol=0
        )
    assert scores.take(batch, mask, trainer) is None  # they are of one rollout
    scores.collect(generate, model, rows, None)
    assert scores.take(batch, mask, trainer) is None  # a turn is missing


def absolute_positions():
    names = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, **{name: SIZES[name] for name in names}))


UNAVAILABLE = {
    "`rollout_func` generates": {"extra": {"rollout_func": scripted_rollout}},
    "position embedding depends on padding": {"model": absolute_positions},
    "`cache_implementation='static'`": {"cache_implementation": "static"},
    "did not show the logits of all its tokens": {"generation_kwargs": {"num_beams": 2}},
}


@pytest.mark.parametrize("reason", UNAVAILABLE)
def test_without_them_a_scoring_pass_measures(reason, out, monkeypatch, caplog):
    calls = recorded(monkeypatch, GRPOTrainer, "_get_per_token_logps_and_entropies")
    run = {"max_steps": 2, "gradient_accumulation_steps": 2, **UNAVAILABLE[reason]}
    if "model" in run:
        run["model"] = run["model"]()
    trainer = train(OPEFOTrainer, OPEFOConfig, out, **run)
    assert len(calls) > 2 * 2
    assert caplog.text.count("A scoring pass measures the flow of rollouts") == 1 and reason in caplog.text
    assert all(row["flow/lambda"] != 0 for row in trainer.state.log_history if "flow/lambda" in row)


def test_a_resumed_run_with_dropout_measures_as_an_uninterrupted_one_does(tmp_path, model_path):
    """No two forwards agree, so generation is as near to the training forward as a scoring pass would be."""
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=64, lora_dropout=0.1)
    run = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 1}
    run["extra"] = {"peft_config": adapter}
    whole = train(OPEFOTrainer, OPEFOConfig, tmp_path, model_path, **run)
    resumed = build(OPEFOTrainer, OPEFOConfig, tmp_path, model_path, **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trainer in (whole, resumed):
        assert trainer.generation_scores.reason is None and trainer.generation_scores.taken
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value), name


def test_scores_that_were_dropped_stay_dropped_in_a_resumed_run():
    scores = GenerationScores("sampled", 1.0, None)
    scores.dropped = True
    resumed = GenerationScores("sampled", 1.0, None)
    resumed.load_state_dict(scores.state_dict())
    assert resumed.reason is not None and not resumed.confirmed


@pytest.mark.parametrize(("logp", "mask"), [(torch.nan, 1), (0.0, 0)])
def test_nothing_is_concluded_from_nothing(logp, mask):
    scores = GenerationScores("sampled", 1.0, None)
    scores.taken = True
    scores.compare({"logps": torch.zeros(1, 2)}, torch.full((1, 2), logp), torch.full((1, 2), mask))
    accelerator = type("OneRank", (), {"reduce": staticmethod(lambda sums, reduction: sums)})
    assert scores.judge(accelerator) is None and not scores.confirmed and scores.reason is None


def test_nothing_is_kept_where_trl_scores_some_of_the_rollouts(out):
    run = {"steps_per_generation": 2, "gradient_accumulation_steps": 3, "strict_on_policy": False, "max_steps": 3}
    trainer = train(OPEFOTrainer, OPEFOConfig, out, flow_scope="running", **run)
    assert not trainer.generation_scores._turns and "TRL scores" in trainer.generation_scores.reason


def test_they_are_dropped_if_the_training_forward_gives_others(out, caplog):
    model = tiny_model()
    for layer in model.model.layers:  # as dropout does: another result in each forward
        layer.register_forward_hook(lambda _module, _args, output: output * (1 + 0.1 * torch.rand(())))
    trainer = train(OPEFOTrainer, OPEFOConfig, out, model, max_steps=3, gradient_accumulation_steps=2)
    assert caplog.text.count("from those of the training forward on average") == 1
    assert trainer.generation_scores.reason is not None
    quiet = train(OPEFOTrainer, OPEFOConfig, out, max_steps=3, gradient_accumulation_steps=2)
    assert quiet.generation_scores.reason is None
    assert not any("sampling/" in key for row in quiet.state.log_history for key in row)
