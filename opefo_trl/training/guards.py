"""Numbers that must not reach the optimizer: NaN and infinity in losses, gradients and rewards; and signs of a run
that has gone wrong without any: stale weights in vLLM, an entropy that is gone.

`watch_reward` marks bad rewards where they arise; `StepGuard` decides, once per optimizer step, whether to stop, to
skip, or to go on; `DriftGuard` looks at every rollout, `CollapseGuard` at every step's entropy. All only look: the
trainer carries the verdict to all ranks and acts on it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SKIPS_IN_A_ROW = 10
DRIFTS_IN_A_ROW = 5
COLLAPSED = 0.005  # nats; near 0.0004 vLLM's log-probabilities become NaN


class NonFiniteError(RuntimeError):
    """A loss, gradient or reward is NaN or infinite, and the update was not taken."""


class StaleWeightsError(RuntimeError):
    """vLLM samples from another policy than the one that trains."""


# ---- rewards


def watch_reward(function: Callable, name: str, is_async: bool) -> Callable:
    """
    Wrap a reward function so that its faults get a name.

    NaN is handed on as `inf`, since TRL takes NaN for "no reward": so every rank sees the fault among the gathered
    rewards. An exception is raised again with the function's name.
    """

    def check(rewards: Any, completions: list) -> list:
        if isinstance(rewards, str | Mapping) or not isinstance(rewards, Iterable):
            raise TypeError(
                f"The reward function {name!r} returned {rewards!r}; return a list with one reward per completion, "
                f"here {len(completions)}."
            )
        rewards = list(rewards)
        if len(rewards) != len(completions):
            return rewards  # TRL's own error names the function and both lengths
        return [checked(reward, index) for index, reward in enumerate(rewards)]

    def checked(reward: Any, index: int) -> Any:
        if reward is None:
            return None
        try:
            value = float("not a number" if isinstance(reward, str) else reward)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The reward function {name!r} returned {reward!r} ({type(reward).__name__}) for completion {index}; "
                "a reward is a number, or None for a completion that it does not judge."
            ) from error
        return math.inf if math.isnan(value) else reward

    def failed(error: Exception) -> RuntimeError:
        return RuntimeError(f"The reward function {name!r} raised {type(error).__name__}: {error}")

    if is_async:

        @functools.wraps(function)
        async def watched(**kwargs: Any) -> Any:
            try:
                rewards = await function(**kwargs)
            except Exception as error:
                raise failed(error) from error
            return check(rewards, kwargs["completions"])

        return watched

    @functools.wraps(function)
    def watched_sync(**kwargs: Any) -> Any:
        try:
            rewards = function(**kwargs)
        except Exception as error:
            raise failed(error) from error
        return check(rewards, kwargs["completions"])

    return watched_sync


# ---- losses and gradients


@dataclass
class MicroBatch:
    """What a guard needs of one micro-batch to tell, after the fact, what went wrong in it. Tensors are detached."""

    inputs: dict[str, Any]  # as they lie in TRL's buffer
    tensors: dict[str, Tensor]  # name -> (B, T) or (B, 1)
    mask: Tensor  # (B, T)
    loss: Tensor

    def __post_init__(self) -> None:
        """Forget numbers that are all in order: kept until the step is taken, they would cost memory. TRL's loss has
        just waited for the device, so that asking it again costs no time."""
        sound = [(tensor.isfinite() | ~self.mask.bool()).all() for tensor in self.tensors.values()]
        if torch.stack([self.loss.isfinite(), *sound]).all():
            self.tensors = {}

    def culprits(self) -> dict[str, Tensor]:
        """The tensors with a non-finite number on a token that trains, each with its rows, (rows,)."""
        found = {}
        for name, tensor in self.tensors.items():
            bad = (~tensor.isfinite() & self.mask.bool()).any(dim=1)
            if bad.any():
                found[name] = bad.nonzero().squeeze(1)
        return found


@dataclass
class Mean:
    """A running mean; NaN of nothing."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass
class StepGuard:
    """
    Looks at every optimizer step before it is taken, counts those that are skipped, and knows when they are too many.

    Args:
        policy (`str`): `"stop"` or `"skip"`.
        folder (`Path`): where to dump the rows of a step that is not finite.
        decode (`Callable`): token ids to text, for the dump.
    """

    policy: str
    folder: Path
    decode: Callable[[Tensor], str]
    window: list[MicroBatch] = field(default_factory=list)  # of the step under way
    skipped: int = 0
    in_a_row: int = 0
    taken: Mean = field(default_factory=Mean)  # loss of the steps taken in this run
    taken_since_log: Mean = field(default_factory=Mean)
    skipped_since_log: int = 0

    def inspect(self, ranks: list[list[float]], rank: int, step: int) -> str | None:
        """
        What is wrong with a step, None if nothing is; the rows of this rank that are to blame are dumped.

        `ranks` holds [loss, gradient norm] of every rank.
        """
        # One rank's NaN loss is in every rank's gradient by now: blame the loss where there is one.
        bad = [number for number, (loss, _) in enumerate(ranks) if not math.isfinite(loss)]
        bad = bad or [number for number, (_, norm) in enumerate(ranks) if not math.isfinite(norm)]
        if not bad:
            return None
        message = f"Step {step}: not finite on rank {', '.join(map(str, bad))}."
        if rank in bad:
            what = describe(self.window) or f"gradient norm {ranks[rank][1]}"
            path = self.folder / f"step-{step}-rank-{rank}.json"
            try:
                dump_rows(path, self.window, self.decode, step=step, rank=rank, what=what)
                message += f" On rank {rank}: {what}; the rows are in {path}."
            except OSError as error:  # a full disk must not keep this rank from the verdict of all
                message += f" On rank {rank}: {what}; {path} could not be written ({error})."
        return message

    def passed(self, loss: float) -> None:
        self.in_a_row = 0
        self.taken.add(loss)
        self.taken_since_log.add(loss)

    def failed(self, message: str) -> None:
        """Stop, or count a skip."""
        if self.policy == "stop":
            raise NonFiniteError(
                f"{message} No parameter was updated. Set `nonfinite='skip'` to leave such steps out and go on."
            )
        self.skipped += 1
        self.skipped_since_log += 1
        self.in_a_row += 1
        if self.in_a_row >= SKIPS_IN_A_ROW:
            raise NonFiniteError(f"{message} It is the {self.in_a_row}th step in a row that had to be skipped.")

    def logged_loss(self, loss: float) -> float:
        """`loss`, unless a step was skipped since the last log: then the mean over those taken, NaN when none was."""
        if self.skipped_since_log:
            loss = self.taken_since_log.value
        self.taken_since_log = Mean()
        self.skipped_since_log = 0
        return loss

    def final_loss(self, loss: float) -> float:
        """`loss`, unless a step of this run was skipped: then the mean over those taken."""
        return self.taken.value if self.skipped else loss

    def state_dict(self) -> dict[str, Any]:
        taken = {"total": self.taken.total, "count": self.taken.count}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "taken": taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.taken = state["skipped"], state["in_a_row"], Mean(**state["taken"])


def describe(window: list[MicroBatch]) -> str:
    """Which tensors of a window are not finite, and where; empty when all are finite."""
    places = []
    for number, micro_batch in enumerate(window):
        culprits = micro_batch.culprits()
        places += [f"{name} of rows {rows.tolist()} in micro-batch {number}" for name, rows in culprits.items()]
        if not culprits and not micro_batch.loss.isfinite():
            places.append(f"loss of micro-batch {number}")
    return "; ".join(places)


def dump_rows(path: Path, window: list[MicroBatch], decode: Callable[[Tensor], str], **context: Any) -> None:
    """Write the offending rows of a window, or all rows where no single one is to blame, as JSON for a person."""
    blamed = [micro_batch.culprits() for micro_batch in window]
    nobody = not any(blamed)
    rows = []
    for number, (micro_batch, culprits) in enumerate(zip(window, blamed, strict=True)):
        guilty = {row for found in culprits.values() for row in found.tolist()}
        for row in range(micro_batch.mask.size(0)) if nobody else sorted(guilty):
            rows.append({"micro_batch": number, "row": row, **_row(micro_batch, row, decode)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**context, "rows": rows}, indent=2, ensure_ascii=False, default=str))


def _row(micro_batch: MicroBatch, row: int, decode: Callable[[Tensor], str]) -> dict[str, Any]:
    inputs, mask = micro_batch.inputs, micro_batch.mask[row].bool()
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    completion = inputs["completion_ids"][row][mask]
    numbers = {
        name: [_readable(value) for value in tensor[row].expand(mask.shape)[mask].tolist()]
        for name, tensor in micro_batch.tensors.items()
    }
    return {
        "prompt": decode(prompt),
        "completion": decode(completion),
        "prompt_ids": prompt.tolist(),
        "completion_ids": completion.tolist(),
        "loss": _readable(micro_batch.loss.item()),
        **numbers,
    }


def _readable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


# ---- signs


@dataclass
class DriftGuard:
    """
    Warns when vLLM's log-probabilities are far from the policy's, and stops when they stay there.

    Args:
        most (`float`, *optional*): mean absolute difference in nats that is still rounding; None takes any.
    """

    most: float | None
    in_a_row: int = 0

    def look(self, drift: float, step: int) -> str | None:
        """What to warn of. `drift` is TRL's `sampling/sampling_logp_difference/mean` of one rollout."""
        if self.most is None or not drift > self.most:  # NaN is the policy's, and StepGuard's business
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        message = (
            f"Step {step}: vLLM's log-probabilities are {drift:.3g} nats from the policy's on average, more than "
            f"`sampling_drift_max={self.most:g}`."
        )
        if self.in_a_row < DRIFTS_IN_A_ROW:
            return message
        raise StaleWeightsError(
            f"{message} It is the {self.in_a_row}th rollout in a row. Likely causes: the weights do not reach vLLM "
            "(sleep mode, an adapter that is not merged, a server that was restarted or serves another model), or "
            "they are served in another precision than they train in. If the difference is meant to be (a quantised "
            "server), raise `sampling_drift_max`, or set it to None."
        )


@dataclass
class CollapseGuard:
    """Warns once when entropy is nearly gone, and again only after it has come back."""

    warned: bool = False

    def look(self, entropy: float, step: int) -> str | None:
        if self.warned or not entropy < COLLAPSED:
            self.warned = self.warned and not entropy > 2 * COLLAPSED
            return None
        self.warned = True
        return (
            f"Step {step}: entropy is {entropy:.2g} nats, and the policy all but deterministic: the completions of a "
            "group are alike, so that there is little left to learn from, and below 0.0004 vLLM returns NaN. Set a "
            "`flow_target`, lower `learning_rate`, or go back to an earlier checkpoint."
        )
