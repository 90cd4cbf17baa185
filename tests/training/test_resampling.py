import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opefo_trl.training.resampling import PromptOrder, Rollout, Round, fresh_groups, has_signal, left_alone

NAN = math.nan


def rewards(*groups):
    """Rewards of groups of two, one function unless a completion is a tuple."""
    rows = [row if isinstance(row, tuple) else (row,) for group in groups for row in group]
    return torch.tensor(rows)


def signals(table, weights=(1.0,), **options):
    return has_signal(table, torch.tensor(weights), 2, **options).tolist()


def test_a_group_has_a_signal_if_its_rewards_differ():
    table = rewards((1.0, 1.0), (0.0, 1.0), (0.1, 0.1), (NAN, 1.0), (NAN, NAN), (-1.0, -2.0))
    assert signals(table) == [False, True, False, False, False, True]
    assert signals(rewards((0.0, 1e-8), (1e-8, 1e-8), (0.3, 0.3 + 3e-8))) == [True, False, False]


def test_rewards_are_compared_by_their_weighted_sum_or_function_by_function():
    table = rewards(((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (1.0, 2.0)), ((0.5, NAN), (0.0, 0.5)))
    assert signals(table, (1.0, 1.0)) == [False, True, False]
    assert signals(table, (1.0, 0.5)) == [True, True, True]
    assert signals(table, (1.0, 0.0)) == [True, False, True]  # a function without weight gives no signal
    assert signals(table, (1.0, 1.0), by_function=True) == [True, True, True]
    assert signals(table, (1.0, 0.0), by_function=True) == [True, False, True]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_signals_are_those_of_numpy(groups):
    expected = [len({value for value in group if not math.isnan(value)}) > 1 for group in groups]
    table = torch.tensor(groups).view(-1, 1)
    assert has_signal(table, torch.ones(1), 3).tolist() == expected


def test_groups_that_are_all_right_or_all_wrong_can_be_left_alone():
    table = rewards((1.0, 0.9), (0.0, 1.0), (0.0, 0.2), (NAN, 0.0), (NAN, 1.0))
    kept = {keep: left_alone(table, 2, keep).tolist() for keep in ("informative", "all_right", "all_wrong")}
    assert kept == {
        "informative": [False] * 5,
        "all_right": [True, False, False, False, False],
        "all_wrong": [False, False, True, False, False],
    }


@pytest.mark.parametrize(
    ("missing", "informative", "graded", "multiple", "count"),
    [
        (3, 8, 16, 1, 6),  # 3 / (8 / 16)
        (4, 5, 16, 1, 13),  # 4 / (5 / 16) = 12.8
        (11, 5, 16, 1, 16),  # 35, but a rollout has 16 groups
        (16, 0, 16, 1, 16),  # nothing is known
        (1, 8, 16, 4, 4),  # 2, but four ranks share a group's rows
    ],
)
def test_as_many_fresh_groups_as_are_likely_to_be_needed(missing, informative, graded, multiple, count):
    assert fresh_groups(missing, informative, graded, 16, multiple) == count


@given(st.integers(1, 12), st.integers(0, 40), st.integers(12, 60), st.sampled_from([1, 2, 4]))
def test_a_round_can_fill_what_is_missing_and_is_no_larger_than_a_rollout(missing, informative, graded, multiple):
    count = fresh_groups(missing, min(informative, graded), graded, 12, multiple)
    assert missing <= count <= 12 and count % multiple == 0


# ---- the order of the prompts


class Shuffles:
    """Yields 0 to 4 in a new order each time it is iterated, as TRL's sampler does."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.generator.permutation(5).tolist())


def test_prompts_are_dealt_pass_after_pass_and_those_put_back_come_first():
    passes = Shuffles()
    expected = [*passes, *passes, *passes]
    order = PromptOrder(Shuffles())
    assert order.take(3) + order.take(4) == expected[:7]
    order.put_back += [4, 1]
    assert order.take(1) == [4]
    assert order.take(4) == [1, *expected[7:10]]


@given(st.lists(st.tuples(st.integers(0, 7), st.lists(st.integers(0, 4), max_size=3)), max_size=6))
def test_a_restored_order_goes_on_where_it_was(history):
    order, restored = PromptOrder(Shuffles()), PromptOrder(Shuffles())
    for count, again in history:
        order.take(count)
        order.put_back += again
    restored.load_state_dict(order.state_dict())
    assert restored.state_dict() == order.state_dict()
    assert restored.take(13) == order.take(13)


# ---- the rounds of a rollout


def graded(prompts, table, begin=0, own=None, **logged):
    """A round of groups of two, with completions named by prompt and place."""
    names = [f"{prompt}{place}" for prompt in prompts for place in "ab"]
    mine = names[begin : begin + (len(names) if own is None else own)]
    metrics = {name: [value] for name, value in logged.items()}
    columns, values = {"column": [name.upper() for name in mine]}, {"groups": [len(prompts)]}
    return Round(prompts, table, None, mine, (mine, None, {}, mine), columns, values, metrics, begin)


FLAT, MIXED = (1.0, 1.0), (0.0, 1.0)


@pytest.fixture
def rollout():
    """Of groups 0 to 3, 1 and 3 are replaced: one by group 5 of the second round, one by 7 of the third."""
    first = graded([0, 1, 2, 3], rewards(MIXED, FLAT, MIXED, FLAT))
    rollout = Rollout(first, 2, [1, 3], 2)
    assert rollout.add(graded([4, 5], rewards(FLAT, MIXED)), [1]) == []
    assert (rollout.missing, rollout.informative, rollout.graded) == ([3], 3, 6)
    assert rollout.add(graded([6, 7, 8], rewards(FLAT, (0.0, 2.0), MIXED)), [1, 2]) == [2]
    return rollout


def test_missing_groups_are_replaced_in_order(rollout):
    assert (rollout.missing, rollout.surplus, rollout.graded, rollout.informative) == ([], 1, 9, 5)
    assert rollout.prompts == [0, 5, 2, 7]
    assert rollout.rewards().flatten().tolist() == [0, 1, 0, 1, 0, 1, 0, 2]
    assert rollout.rewards([-each.rewards for each in rollout.rounds]).sum() == -5
    rows = rollout.own_rows()
    assert [parts for parts, _ in rows][2:4] == [["5a", None, None, "5a"], ["5b", None, None, "5b"]]
    assert [columns["column"] for _, columns in rows] == ["0A", "0B", "5A", "5B", "2A", "2B", "7A", "7B"]
    assert rollout.unused() == [
        *((0, 2), (0, 3), (0, 6), (0, 7)),
        *((1, 0), (1, 1)),
        *((2, 0), (2, 1), (2, 4), (2, 5)),
    ]


def test_a_group_may_move_to_another_rank(monkeypatch):
    """Each of two ranks has a group and makes a row of the fresh one, which replaces the second rank's."""
    sent = []

    def own_rows(rank):
        rollout = Rollout(graded([0, 1], rewards(MIXED, FLAT), 2 * rank, 2), 2, [1], 1)
        rollout.add(graded([2], rewards(MIXED), rank, 1), [0])
        return [parts[0] for parts, _ in rollout.own_rows()]

    def gather(mine):
        sent.extend(entry for entry in mine if entry not in sent)
        return sent

    monkeypatch.setattr("opefo_trl.training.resampling.gather_object", gather)
    assert own_rows(0) == ["0a", "0b"]
    assert own_rows(1) == ["2a", "2b"]
    assert [row for row, _ in sent] == [2, 3]


def test_metrics_of_rounds_are_those_of_one():
    names = ("completions/{}_length", "completions/{}_terminated_length")
    low, mean, high = ([name.format(word) for name in names] for word in ("min", "mean", "max"))

    def lengths(ended, cut):
        """What TRL logs of completions of these lengths."""
        both = ended + cut
        values = {low[0]: min(both), mean[0]: np.mean(both), high[0]: max(both), "num_tokens": 100 * len(both)}
        values |= {low[1]: min(ended, default=0), mean[1]: np.mean(ended or [0]), high[1]: max(ended, default=0)}
        return values | {"completions/clipped_ratio": len(cut) / len(both)}

    rounds = [([3, 5], [9, 9]), ([], [9, 9]), ([4], [9])]
    rollout = Rollout(graded([0, 1], rewards(FLAT, FLAT), **lengths(*rounds[0])), 2, [0, 1], 0)
    for ended, cut in rounds[1:]:
        rollout.add(graded([2], rewards(FLAT), **lengths(ended, cut)), [])
    expected = lengths([3, 5, 4], [9] * 5) | {"num_tokens": 200}  # a count, of which the last one holds
    assert rollout.metrics() == pytest.approx(expected)


def test_values_of_reward_functions_weigh_as_their_rows_do(rollout):
    assert rollout.values() == {"groups": [4] * 8 + [2] * 4 + [3] * 6}
    assert Rollout(rollout.rounds[0], 2, [], 2).values() == {"groups": [4]}


def test_a_failure_of_a_tool_weighs_as_the_calls_do():
    calls = [(4, 2), (2, 2)]  # calls and failures in two rounds of four completions
    rounds = [
        SimpleNamespace(**{"tools/call_frequency": count / 4, "tools/failure_frequency": failed / count})
        for count, failed in calls
    ]
    rollout = Rollout(graded([0, 1], rewards(FLAT, FLAT), **vars(rounds[0])), 2, [0, 1], 0)
    rollout.add(graded([2, 3], rewards(FLAT, FLAT), **vars(rounds[1])), [])
    assert rollout.metrics() == pytest.approx({"tools/call_frequency": 6 / 8, "tools/failure_frequency": 4 / 6})


def test_a_bad_reward_in_any_round_marks_the_rollout(rollout):
    assert not rollout.bad
    rollout.rounds[1].bad = True
    assert rollout.bad
