import functools
import math
import re

import pytest
import torch
from tiny import digit_reward, tiny_dataset, tiny_model, train
from watched_runs import assert_same, run

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.rewards import format_reward, math_reward
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


def watched(returned):
    def picky(completions, **kwargs):
        if isinstance(returned, Exception):
            raise returned
        return returned

    return watch_reward(picky, "picky", is_async=False)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (KeyError("answer"), RuntimeError, "'picky' raised KeyError: 'answer'"),
        (None, TypeError, "'picky' returned None; return a list with one reward per completion, here 8"),
        ("01234567", TypeError, "'picky' returned '01234567'; return a list with one reward per completion, here 8"),
        (dict.fromkeys(range(8), 1.0), TypeError, "return a list with one reward per completion, here 8"),
        ([0, 0, 0, "good"] * 2, TypeError, "'picky' returned 'good' (str) for completion 3"),
        ([0, 0, 0, "0.5"] * 2, TypeError, "'picky' returned '0.5' (str) for completion 3"),
    ],
    ids=str,
)
def test_a_reward_function_that_fails_or_returns_something_else_is_named(returned, error, message):
    with pytest.raises(error, match=re.escape(message)) as failed:
        watched(returned)(completions=["a"] * 8)
    assert not isinstance(returned, Exception) or failed.value.__cause__ is returned


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0] * 9])
def test_a_reward_list_of_wrong_length_is_refused(rewards, out):
    error, _, after = run(out, reward=watched(rewards))
    assert isinstance(error, ValueError)
    assert f"'picky' returned {len(rewards)} rewards, but 8 were expected" in str(error)
    assert_same(dict(tiny_model().named_parameters()), after)


def test_the_nan_of_a_reward_model_is_a_fault():
    """A reward model has no None that its NaN could stand for."""
    guard = RewardGuard.watch("stop", [torch.nn.Linear(1, 1)], ["judge"])
    with pytest.raises(NonFiniteError, match="'judge' returned NaN or infinity for completion 2 of rank 0: 'c'"):
        guard.check(torch.tensor([[0.0], [0.0], [math.nan]]), list("abc"), rank=0, step=0, training=True)


def test_many_bad_rewards_are_counted_and_not_all_listed():
    guard, bad = RewardGuard("stop", ["picky"], [False], judges=[]), torch.full((8, 1), math.inf)
    with pytest.raises(NonFiniteError, match="for completion 2 of rank 0.*; and 5 more. No parameter") as error:
        guard.check(bad, ["a"] * 8, rank=0, step=1, training=True)
    assert "for completion 3 of rank 0" not in str(error.value)


def test_a_watched_reward_hands_good_rewards_on_untouched():
    rewards = [1, 0.5, None, torch.tensor(2.0), math.inf]
    handed = watched(rewards)(completions=["a"] * 5)
    assert all(left is right for left, right in zip(handed, rewards, strict=True))


def test_an_environment_gives_rewards_without_completions():
    """TRL calls the reward of an environment with `environments`, and its tests do so without anything else."""
    reward = watch_reward(lambda environments: [1.0, None], "environment", is_async=False)
    assert reward(environments=[None, None]) == [1.0, None]
    with pytest.raises(TypeError, match="'environment' returned None; return a list"):
        watch_reward(lambda environments: None, "environment", is_async=False)(environments=[])


@pytest.mark.parametrize("judges", [True, False])
def test_a_completion_without_its_judges_verdict_has_no_reward(judges):
    """TRL adds up the other rewards, and a completion without a verdict would become a wrong one."""
    assert math_reward.judges
    judge = functools.partial(math_reward) if judges else digit_reward
    functions = [watch_reward(function, "", False) for function in (judge, format_reward)]  # as the trainer has them
    guard = RewardGuard.watch("stop", functions, ["judge", "format"])
    rewards = torch.tensor([[1.0, 0.5], [math.nan, 0.5]])
    checked, warning = guard.check(rewards, ["a", "b"], rank=0, step=1, training=True)
    assert checked[0].tolist() == [1.0, 0.5] and checked[1].isnan().tolist() == [True, judges] and warning is None
