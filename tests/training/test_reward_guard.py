import math

import pytest
import torch
from tiny import digit_reward, tiny_dataset, tiny_model, tiny_tokenizer, train
from transformers import Qwen2Config
from transformers.modeling_outputs import SequenceClassifierOutput
from watched_runs import assert_same, run

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.training.guards import NonFiniteError
from opefo_trl.training.reward_guard import RewardGuard, watch_reward


def broken_reward(value, at_call=2, row=3):
    calls = []

    def picky(completions, **kwargs):
        calls.append(1)
        rewards = digit_reward(completions)
        if len(calls) == at_call:
            rewards[row] = value
        return rewards

    return picky


def async_reward(value):
    inner = broken_reward(value)

    async def picky(completions, **kwargs):
        return inner(completions)

    return picky


@pytest.mark.parametrize("wrap", [broken_reward, async_reward])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400], ids=str)
def test_a_reward_that_is_no_number_stops_the_run_and_names_function_and_completion(value, wrap, out):
    error, before, after = run(out, reward=wrap(value))
    assert isinstance(error, NonFiniteError)
    assert "Step 2: reward function 'picky' returned NaN or infinity for completion 3 of rank 0: '" in str(error)
    assert "Return None" in str(error)
    assert_same(before[2], after)


def test_none_is_no_fault(out):
    trainer, *_ = run(out, reward=broken_reward(None))
    assert trainer.state.global_step == 4


def test_a_bad_reward_can_be_skipped(out):
    trainer, before, _ = run(out, reward=broken_reward(math.nan), nonfinite="skip")
    assert_same(before[2], before[3])
    assert not all(torch.equal(before[3][name], before[4][name]) for name in before[4])
    rows = trainer.state.log_history[:4]
    assert [row["guard/skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert all(math.isfinite(row["reward"]) for row in rows)


def test_every_update_of_a_bad_rollout_is_skipped(out):
    overrides = {"nonfinite": "skip", "num_iterations": 2, "strict_on_policy": False, "max_steps": 6}
    trainer, before, _ = run(out, reward=broken_reward(math.inf), **overrides)
    assert [row["guard/skipped_steps"] for row in trainer.state.log_history[:6]] == [0, 0, 1, 2, 2, 2]
    assert_same(before[3], before[5])


def test_a_step_is_skipped_if_any_of_its_rollouts_is_bad(out):
    overrides = {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "strict_on_policy": False}
    common = {"flow_scope": "running", "nonfinite": "skip", "per_device_train_batch_size": 4, "max_steps": 3}
    # calls 3 and 4 are the two rollouts of step 2; the fault is in the first
    trainer, before, after = run(out, reward=broken_reward(math.nan, at_call=3), **common, **overrides)
    assert [row["guard/skipped_steps"] for row in trainer.state.log_history[:3]] == [0, 1, 1]
    assert_same(before[2], before[3])
    assert not all(torch.equal(before[3][name], after[name]) for name in after)


def test_a_reward_model_is_watched_too(out):
    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Qwen2Config(name_or_path="org/judge")

        def forward(self, input_ids, **kwargs):
            logits = torch.zeros(len(input_ids), 1)
            logits[2] = math.nan
            return SequenceClassifierOutput(logits=logits)

    extra = {"reward_funcs": Judge(), "reward_processing_classes": tiny_tokenizer()}
    with pytest.raises(NonFiniteError, match=r"'judge' returned NaN or infinity for completion 2 of rank 0: '"):
        train(OPEFOTrainer, OPEFOConfig, out, max_steps=1, extra=extra)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_reward_in_evaluation_is_warned_about_and_left_out_of_the_means(policy, out, caplog):
    def picky(completions, held_out=None, **kwargs):
        return digit_reward(completions) if held_out is None else [math.nan, *digit_reward(completions)[1:]]

    extra = {"reward_funcs": picky, "eval_dataset": tiny_dataset(1).map(lambda row: {"held_out": True})}
    common = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 3}
    rows = train(OPEFOTrainer, OPEFOConfig, out, nonfinite=policy, extra=extra, **common).state.log_history
    assert all(math.isfinite(row["eval_reward"]) for row in rows if "eval_reward" in row)
    assert [row["guard/skipped_steps"] for row in rows if "guard/skipped_steps" in row] == [0, 0, 0]
    assert "Evaluation after step 1: reward function 'picky' returned NaN or infinity for completion 0" in caplog.text


def test_many_bad_rewards_are_counted_and_not_all_listed(out):
    error, *_ = run(out, reward=lambda completions, **_: [math.nan] * len(completions))
    assert "for completion 2 of rank 0" in str(error) and "and 5 more. No parameter" in str(error)
    assert "for completion 3 of rank 0" not in str(error)


def test_a_reward_function_that_raises_is_named(out):
    def picky(completions, **kwargs):
        raise KeyError("answer")

    error, _, after = run(out, reward=picky)
    assert isinstance(error, RuntimeError)
    assert str(error) == "The reward function 'picky' raised KeyError: 'answer'"
    assert isinstance(error.__cause__, KeyError)
    assert_same(dict(tiny_model().named_parameters()), after)


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0] * 9])
def test_a_reward_list_of_wrong_length_is_refused(rewards, out):
    def picky(completions, **kwargs):
        return rewards

    error, _, after = run(out, reward=picky)
    assert isinstance(error, ValueError)
    assert f"'picky' returned {len(rewards)} rewards, but 8 were expected" in str(error)
    assert_same(dict(tiny_model().named_parameters()), after)


@pytest.mark.parametrize("rewards", ["01234567", dict.fromkeys(range(8), 1.0)], ids=["text", "map"])
def test_a_reward_that_is_no_list_is_refused(rewards, out):
    def picky(completions, **kwargs):
        return rewards

    error, *_ = run(out, reward=picky)
    assert isinstance(error, TypeError) and "return a list with one reward per completion, here 8" in str(error)


@pytest.mark.parametrize("value", ["good", "0.5"])
def test_a_reward_that_is_no_number_at_all_is_refused(value, out):
    error, _, after = run(out, reward=broken_reward(value, at_call=1))
    assert isinstance(error, TypeError)
    assert f"The reward function 'picky' returned {value!r} (str) for completion 3" in str(error)
    assert_same(dict(tiny_model().named_parameters()), after)


def test_a_reward_function_that_forgets_to_return_is_named(out):
    def picky(completions, **kwargs):
        digit_reward(completions)

    error, _, after = run(out, reward=picky)
    assert isinstance(error, TypeError)
    assert str(error) == (
        "The reward function 'picky' returned None; return a list with one reward per completion, here 8."
    )
    assert_same(dict(tiny_model().named_parameters()), after)


def test_reward_functions_keep_their_names_and_settings(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=1)
    assert trainer.reward_func_names == ["digit_reward"]
    assert "rewards/digit_reward/mean" in trainer.state.log_history[0]


def test_a_watched_reward_hands_good_rewards_on_untouched():
    rewards = [1, 0.5, None, torch.tensor(2.0), math.inf]
    watched = watch_reward(lambda completions: rewards, "plain", is_async=False)
    handed = watched(completions=["a"] * 5)
    assert all(left is right for left, right in zip(handed, rewards, strict=True))


def test_an_environment_gives_rewards_without_completions():
    """TRL calls the reward of an environment with `environments`, and its tests do so without anything else."""
    watched = watch_reward(lambda environments: [1.0, None], "environment", is_async=False)
    assert watched(environments=[None, None]) == [1.0, None]
    with pytest.raises(TypeError, match="'environment' returned None; return a list"):
        watch_reward(lambda environments: None, "environment", is_async=False)(environments=[])


def test_a_completion_without_its_judges_verdict_has_no_reward():
    guard = RewardGuard("stop", ["math", "format"], [False, False], judges=[0])
    rewards = torch.tensor([[1.0, 0.5], [math.nan, 0.5]])
    checked, warning = guard.check(rewards, ["a", "b"], rank=0, step=1, training=True)
    assert checked[0].tolist() == [1.0, 0.5] and checked[1].isnan().all() and warning is None
