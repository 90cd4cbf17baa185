"""Which groups of a rollout lack a signal, how many fresh ones to generate, and which of them are taken.

A group has no signal if all its rewards are equal: its advantages are 0. `dynamic_sampling` generates and grades; what
is here works on plain lists and on the rewards, which are the same on all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from opefo_trl.training.answer_diversity import RIGHT, weighted_sum
from opefo_trl.trl_compat import COUNTERS

__all__: list[str] = []  # of use inside this package only


def has_signal(rewards: Tensor, weights: Tensor, generations: int, by_function: bool = False) -> Tensor:
    """
    Return which groups have completions with different rewards, (groups,). Completions without a reward are ignored.

    Args:
        rewards (`Tensor`): rewards of all ranks, (completions, functions), NaN where none was given.
        weights (`Tensor`): weights of the reward functions.
        generations (`int`): completions in a group.
        by_function (`bool`): compare the rewards of each function, not their sum.
    """
    weighted = rewards * weights.to(rewards.device) if by_function else weighted_sum(rewards, weights).unsqueeze(1)
    groups = weighted.view(-1, generations, weighted.size(1))
    lowest = groups.masked_fill(groups.isnan(), torch.inf).amin(1)
    highest = groups.masked_fill(groups.isnan(), -torch.inf).amax(1)
    # Sums that are equal but for rounding, 0.1 + 0.2 and 0.3, are no signal
    return (highest - lowest > 1e-6 * torch.maximum(highest.abs(), lowest.abs())).any(1)


def left_alone(rewards: Tensor, generations: int, keep: str) -> Tensor:
    """Return which groups `resample_keep` leaves alone whether or not they have a signal, (groups,)."""
    answers = rewards[:, :1].view(-1, generations)  # the first function judges the answer
    if keep == "informative":
        return torch.zeros(len(answers), dtype=torch.bool, device=rewards.device)
    return (answers > RIGHT).all(1) if keep == "all_right" else (answers <= RIGHT).all(1)


def fresh_groups(missing: int, informative: int, graded: int, most: int, multiple: int) -> int:
    """
    Return how many groups to generate so that about `missing` of them have a signal.

    Args:
        informative, graded (`int`): groups with a signal among all groups that were graded so far.
        most (`int`): groups of a whole rollout, the upper bound.
        multiple (`int`): the number is rounded up to it, so that all ranks generate as many rows.
    """
    wanted = math.ceil(missing * graded / informative) if informative else most
    return min(most, math.ceil(wanted / multiple) * multiple)


class PromptOrder:
    """
    Deals out prompts in the order of TRL's sampler, pass after pass; those that were put back come first.

    Args:
        sampler (`Iterable[int]`): yields each index of the dataset once, in a new order each time it is iterated.
    """

    def __init__(self, sampler: Iterable[int]):
        self.sampler = sampler
        self.passes, self.position, self.order = 0, 0, []  # type: ignore[var-annotated]
        self.put_back: list[int] = []

    def take(self, count: int) -> list[int]:
        """Return the next `count` indices."""
        taken, self.put_back = self.put_back[:count], self.put_back[count:]
        while len(taken) < count:
            if self.position >= len(self.order):
                self._begin_pass()
            more = self.order[self.position : self.position + count - len(taken)]
            taken, self.position = taken + more, self.position + len(more)
        return taken

    def _begin_pass(self) -> None:
        self.order, self.position, self.passes = list(self.sampler), 0, self.passes + 1

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "position": self.position, "put_back": self.put_back}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state into a `PromptOrder` that has dealt out nothing yet."""
        for _ in range(state["passes"]):
            self._begin_pass()
        self.position, self.put_back = state["position"], list(state["put_back"])


@dataclass
class Round:
    """
    A graded round of generation.

    Attributes:
        prompts (`list[int]`): the index in the dataset of each group, over all ranks.
        rewards (`Tensor`): rewards of all ranks, (rows, functions).
        unchecked (`Tensor`, *optional*): the same as TRL gathered them, before our guard or a subclass changed any.
        texts (`list`): the prompts of the rows of this rank.
        generated (`tuple`): what TRL's `_generate` returned for them.
        columns, values (`dict`): what reward functions logged for them, with `log_extra` and with `log_metric`.
        metrics (`dict`): what TRL logged meanwhile.
        begin (`int`): the index of this rank's first row among those of all ranks.
        bad (`bool`): whether a reward was NaN or infinite.
    """

    prompts: list[int]
    rewards: Tensor
    unchecked: Tensor | None
    texts: list[Any]
    generated: tuple[Any, ...]
    columns: dict[str, list[Any]]
    values: dict[str, list[float]]
    metrics: dict[str, list[float]]
    begin: int
    bad: bool = False

    @property
    def own(self) -> range:
        """The rows of this rank."""
        return range(self.begin, self.begin + len(self.texts))

    def row(self, row: int) -> tuple[list[Any], dict[str, Any]]:
        """Return a row of this rank: its part of every list of `generated`, and its logged columns."""
        index, count = row - self.begin, len(self.texts)
        parts = [part[index] if has_rows(part, count) else None for part in self.generated]
        return parts, {name: values[index] for name, values in self.columns.items() if index < len(values)}


def has_rows(part: Any, count: int) -> bool:
    return isinstance(part, list) and len(part) == count


class Rollout:
    """
    The groups of a rollout, each from one of its rounds.

    Args:
        first (`Round`): the round that generated a whole rollout.
        generations (`int`): completions in a group.
        missing (`list[int]`): groups to be replaced.
        informative (`int`): groups with a signal in all rounds so far.
    """

    def __init__(self, first: Round, generations: int, missing: list[int], informative: int):
        self.rounds, self.generations, self.missing, self.informative = [first], generations, missing, informative
        self.sources = [(0, group) for group in range(len(first.prompts))]  # of each group: round and group in it
        self.surplus = 0

    def add(self, fresh: Round, informative: list[int]) -> list[int]:
        """Replace missing groups by informative ones of another round; return the groups that were not needed."""
        for slot, group in zip(self.missing, informative, strict=False):
            self.sources[slot] = len(self.rounds), group
        surplus = informative[len(self.missing) :]
        self.rounds.append(fresh)
        self.missing = self.missing[len(informative) :]
        self.informative += len(informative)
        self.surplus += len(surplus)
        return surplus

    @property
    def bad(self) -> bool:
        return any(each.bad for each in self.rounds)

    @property
    def graded(self) -> int:
        return sum(len(each.prompts) for each in self.rounds)

    def source_of(self, row: int) -> tuple[int, int]:
        """Return the round that a row of the rollout comes from, and its row there."""
        group, place = divmod(row, self.generations)
        number, source = self.sources[group]
        return number, source * self.generations + place

    def rewards(self, rounds: Sequence[Tensor] | None = None) -> Tensor:
        """Return the rows of the rollout among the rewards of its rounds, (rows, functions)."""
        rounds = [each.rewards for each in self.rounds] if rounds is None else rounds
        groups = [rewards.view(-1, self.generations, rewards.size(1)) for rewards in rounds]
        return torch.cat([groups[number][group] for number, group in self.sources])

    @property
    def prompts(self) -> list[int]:
        """The index in the dataset of each group, over all ranks."""
        return [self.rounds[number].prompts[group] for number, group in self.sources]

    def own_rows(self) -> list[tuple[list[Any], dict[str, Any]]]:
        """Return this rank's rows of the rollout, in one collective if any came from another round: a group may move
        to another rank."""
        moved = {}
        if len(self.rounds) > 1:
            sources = {row: self.source_of(row) for row in range(len(self.rounds[0].rewards))}
            mine = [
                (row, self.rounds[number].row(source))
                for row, (number, source) in sources.items()
                if number and source in self.rounds[number].own
            ]
            moved = dict(gather_object(mine))
        first = self.rounds[0]
        return [moved[row] if self.source_of(row)[0] else first.row(row) for row in first.own]

    def unused(self) -> list[tuple[int, int]]:
        """Return round and row of this rank's rows that are not in the rollout."""
        used = set(self.sources)
        return [
            (number, row)
            for number, each in enumerate(self.rounds)
            for row in each.own
            if (number, row // self.generations) not in used
        ]

    def values(self) -> dict[str, list[float]]:
        """Return what reward functions logged with `log_metric`; of several rounds, the means, once a row."""
        values: dict[str, list[float]] = {}
        for each in self.rounds:
            for name, logged in each.values.items():
                mean = [sum(logged) / len(logged)] * len(each.texts)
                values[name] = [*values.get(name, []), *(mean if len(self.rounds) > 1 else logged)]
        return values

    def metrics(self) -> dict[str, float]:
        """Return what TRL logged in the rounds, as if they were one: means by their rows, minima and maxima."""
        names = dict.fromkeys(name for each in self.rounds for name in each.metrics)
        return {name: _merge(name, [each for each in self.rounds if name in each.metrics]) for name in names}


def _merge(name: str, rounds: Sequence[Round]) -> float:
    values = [each.metrics[name][-1] for each in rounds]
    if name in COUNTERS:
        return values[-1]
    pairs = [(value, _weight(name, each)) for value, each in zip(values, rounds, strict=True)]
    pairs = [(value, weight) for value, weight in pairs if weight and not math.isnan(value)]
    if not pairs:
        return values[-1]
    for extreme, word in ((min, "min_"), (max, "max_")):
        if name.rpartition("/")[2].startswith(word):
            return extreme(value for value, _ in pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _weight(name: str, each: Round) -> float:
    """Return what a metric is a mean over: completions, those that ended, or tool calls."""
    rows = float(len(each.rewards))
    if "terminated" in name:
        return rows * (1 - each.metrics["completions/clipped_ratio"][-1])
    return rows * each.metrics["tools/call_frequency"][-1] if name == "tools/failure_frequency" else rows
