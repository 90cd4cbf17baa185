"""The plan alone, without a trainer: every row once, nothing above the budget, as little padding as can be."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opefo_trl.training.microbatches import (
    Group,
    Widths,
    join,
    plan,
    scatter,
    take,
    take_columns,
    widths_of,
)

row = st.tuples(st.integers(1, 40), st.integers(1, 90))


@given(st.lists(row, min_size=1, max_size=48), st.integers(1, 8), st.data())
def test_a_plan_is_a_permutation_of_the_kept_rows_within_the_budget(lengths, groups, data):
    widths = Widths([prompt for prompt, _ in lengths], [completion for _, completion in lengths])
    kept = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    groups = min(groups, len(kept))
    each = -(-len(kept) // groups)
    budget = Group(list(range(each)), max(widths.prompts), max(widths.completions))
    planned = plan(kept, widths, groups, budget)
    assert len(planned) == groups and all(group.rows for group in planned)
    assert sorted(row for group in planned for row in group.rows) == sorted(kept)
    for group in planned:
        assert group.padded <= budget.padded
        assert len(group.rows) * group.completion <= each * budget.completion
        assert group == widths.group(group.rows)


@given(st.lists(st.integers(1, 30), min_size=3, max_size=9), st.integers(1, 3))
def test_no_other_cut_of_the_sorted_rows_is_cheaper(completions, groups):
    widths = Widths([4] * len(completions), completions)
    budget = Group(list(range(len(completions))), 4, max(completions))
    order = sorted(range(len(completions)), key=lambda row: completions[row])
    costs = []
    for cuts in combinations(range(1, len(order)), groups - 1):
        borders = [0, *cuts, len(order)]
        parts = [order[a:b] for a, b in pairwise(borders)]
        costs.append(sum(widths.group(part).padded for part in parts))
    assert sum(group.padded for group in plan(order, widths, groups, budget)) == min(costs)


def test_what_cannot_be_planned_is_said():
    widths = Widths([1, 1, 1], [5, 5, 5])
    with pytest.raises(ValueError, match="3 rows cannot make 4 micro-batches; each needs one"):
        plan(range(3), widths, 4, Group([0], 1, 5))
    with pytest.raises(ValueError, match="3 rows do not fit into 1 micro-batches of 6 padded tokens"):
        plan(range(3), widths, 1, Group([0], 1, 5))


def batch() -> dict:
    return {
        "prompt_ids": torch.tensor([[0, 0, 5], [0, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "ratio": torch.tensor([[0.5], [2.0]]),
        "names": ["a", "b"],
        "num_items_in_batch": torch.tensor(4),
        "nothing": None,
    }


def test_widths_reach_to_the_outermost_token_and_round_up():
    assert widths_of(batch()) == Widths([1, 2], [2, 3])  # the hole in the second mask is not its end
    assert widths_of(batch(), multiple=2) == Widths([2, 2], [2, 4])
    assert widths_of(batch(), multiple=8) == Widths([3, 3], [4, 4])
    assert widths_of(batch(), trim_prompts=False) == Widths([3, 3], [2, 3])
    empty = {**batch(), "completion_mask": torch.zeros(2, 4, dtype=torch.long)}
    assert widths_of(empty).completions == [2, 2]  # TRL's metrics take one column for one number a row


def test_take_trims_prompts_on_the_left_and_all_else_on_the_right():
    taken = take(batch(), Group([1], 2, 3))
    assert taken["prompt_ids"].tolist() == [[6, 7]] and taken["completion_ids"].tolist() == [[3, 4, 5]]
    assert taken["advantages"].tolist() == [-1.0] and taken["ratio"].tolist() == [[2.0]] and taken["names"] == ["b"]
    assert taken["num_items_in_batch"] == 4 and taken["nothing"] is None
    both = join([take(batch(), Group([0], 3, 4)), take(batch(), Group([1], 3, 4))])
    assert all(
        torch.equal(value, batch()[name]) if torch.is_tensor(value) else value == batch()[name]
        for name, value in both.items()
    )


def test_take_columns_and_scatter_are_each_others_inverse():
    ids = torch.arange(1, 15).view(2, 7)
    groups = [Group([1], 2, 3), Group([0], 1, 2)]
    parts = [take_columns(ids, ids, 4, group) for group in groups]
    assert parts[0][0].tolist() == [[9 + 0, 10, 11, 12, 13]] and parts[1][0].tolist() == [[3, 4, 5]]
    completions = [part[:, group.prompt :] for (part, _), group in zip(parts, groups, strict=True)]
    assert scatter(completions, groups, 4).tolist() == [[4, 5, 0, 0], [11, 12, 13, 0]]
    assert scatter([None, None], groups, 4) is None
