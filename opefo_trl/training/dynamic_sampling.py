"""Dynamic sampling: groups without a signal are replaced by groups of fresh prompts, before anything is trained on.

Works between TRL's `_generate` and `_calculate_rewards`, on lists of rows. TRL gets one rollout, which it pads, scores
and normalizes as if it had generated exactly these rows. All of them come from the same policy.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor
from tqdm import tqdm

from opefo_trl.training.answer_diversity import weighted_sum
from opefo_trl.training.microbatches import trained_mask
from opefo_trl.training.rebatching import PUSHED
from opefo_trl.training.resampling import PromptOrder, Rollout, Round, fresh_groups, has_rows, has_signal, left_alone
from opefo_trl.trl_compat import COUNTERS, RepeatSampler

__all__: list[str] = []  # of use inside this package only

_COMPLETION_IDS, _COMPLETIONS, _IMAGES = 1, 3, 6  # indices in the result of `GRPOTrainer._generate`
_REFUSED = "`resample_rounds` above 0 needs"
_OFF = "Set `resample_rounds=0`."


class DynamicSampling:
    """
    Overrides how TRL's `GRPOTrainer` makes a rollout: `_generate_and_score_completions`, `_generate` and
    `_calculate_rewards`. Does nothing with `resample_rounds=0`.

    The prompts of every round, the first included, come from `prompt_order`; the rows of the data loader only say
    how many there are.
    """

    prompt_order: PromptOrder | None = None
    _sampler: Iterable[int] | None = None  # of the data loader's rows; an IterableDataset has none
    _first: list[int]  # prompts of the first round of the rollout under way, over all ranks
    _inputs: list[dict[str, Any]] | None = None  # its rows of the dataset, on this rank
    _rollout: Rollout | None = None
    _unchecked: Tensor | None = None  # what TRL's last grading has returned
    _assembled: Tensor | None = None  # rewards to return instead of grading the rollout again
    _signal: Tensor | None = None  # which groups of all ranks have a signal

    def _begin_sampling(self: Any) -> None:
        """Reset all state of a run; raise if this trainer's data or rollout cannot be sampled again."""
        self.prompt_order = self._inputs = self._assembled = self._signal = None
        if not self.args.resample_rounds:
            return
        check_trainer(self)
        sampler = self._get_train_sampler()
        if not isinstance(sampler, RepeatSampler):
            raise ValueError(f"{_REFUSED} the order of TRL's RepeatSampler, not of a {type(sampler).__name__}. {_OFF}")
        sampler.mini_repeat_count = sampler.batch_size = sampler.repeat_count = 1  # the same order, each prompt once
        self.prompt_order = PromptOrder(sampler)

    def _get_train_sampler(self: Any, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        return self._sampler

    def _skip_orders(self, epochs: int) -> None:
        """Draw the orders of past epochs, for a run that is resumed: TRL's sampler draws one for each epoch, and would
        begin again with that of the first."""
        if self._sampler is not None:
            for _ in range(epochs):
                next(iter(self._sampler))

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generate = super()._generate_and_score_completions  # type: ignore[misc]
        if self.prompt_order is None:
            return generate(inputs)
        if not self.model.training:
            if self._logs["prompt"].maxlen > self.args.generation_batch_size:  # the first batch of an evaluation
                self._empty_tables(1)
            return generate(inputs)
        groups = len(inputs) * self.accelerator.num_processes // self.num_generations
        self._first = self.prompt_order.take(groups)
        self._inputs = self._dataset_rows(self._first)
        self._empty_tables(1 + self.args.resample_rounds)
        try:
            with self._metrics_apart() as metrics:
                batch = generate(self._inputs)
            self.reward_guard.rollout_is_bad |= self._rollout.bad  # in a round that may have left no row
            self._log_rollout(metrics)
        finally:
            self._inputs = self._rollout = self._assembled = None
        return batch

    def _empty_tables(self: Any, rollouts: int) -> None:
        """Replace TRL's tables of completions, which have room for one rollout, by empty ones with room for more."""
        table: Any = partial(deque, maxlen=self.args.generation_batch_size * rollouts)
        self._logs = {
            name: defaultdict(table) if isinstance(log, dict) else table() for name, log in self._logs.items()
        }

    def _generate(self: Any, prompts: list[Any]) -> tuple[Any, ...]:
        if self._inputs is None:
            return super()._generate(prompts)  # type: ignore[misc]
        first, start = self._round(self._first), time.perf_counter()
        signal = self._with_signal(first.rewards)
        missing = (~signal & ~left_alone(first.rewards, self.num_generations, self.args.resample_keep)).nonzero()
        rollout = Rollout(first, self.num_generations, missing.flatten().tolist(), int(signal.sum()))
        self._rollout = rollout
        for number in range(1, self.args.resample_rounds + 1):
            if rollout.bad or not rollout.missing:
                break
            fresh = self._fresh_round(number)
            informative = self._with_signal(fresh.rewards).nonzero().flatten().tolist()
            self.prompt_order.put_back += [fresh.prompts[group] for group in rollout.add(fresh, informative)]
        self._seconds = time.perf_counter() - start
        return self._assemble(prompts)

    def _fresh_round(self: Any, number: int) -> Round:
        rollout, groups = self._rollout, len(self._first)
        processes = self.accelerator.num_processes
        multiple = processes // math.gcd(processes, self.num_generations)
        count = fresh_groups(len(rollout.missing), rollout.informative, rollout.graded, groups, multiple)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            tqdm.write(
                f"Step {self.state.global_step + 1}, round {number} of {self.args.resample_rounds}: generating "
                f"{count} fresh groups, since {len(rollout.missing)} of {groups} have no signal."
            )
        return self._round(self.prompt_order.take(count))

    def _round(self: Any, prompts: list[int]) -> Round:
        """Generate and grade a group for each of these prompts, over all ranks."""
        rows = self._dataset_rows(prompts)
        texts = [row["prompt"] for row in rows]
        with self._metrics_apart() as metrics:
            generated = super()._generate(texts)  # type: ignore[misc]
            if generated[_IMAGES] is not None:
                raise ValueError(f"{_REFUSED} text; a tool has returned an image. {_OFF}")
            self._unchecked = None
            rewards = self._calculate_rewards(rows, texts, generated[_COMPLETIONS], generated[_COMPLETION_IDS])
        columns, values = dict(self._pending_extra_logs), dict(self._pending_metrics)
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        begin, bad = self.accelerator.process_index * len(rows), self.reward_guard.rollout_is_bad
        return Round(prompts, rewards, self._unchecked, texts, generated, columns, values, dict(metrics), begin, bad)

    def _dataset_rows(self: Any, prompts: list[int]) -> list[dict[str, Any]]:
        """Return this rank's rows of the dataset, each repeated for the completions of its group."""
        count = len(prompts) * self.num_generations // self.accelerator.num_processes
        begin = count * self.accelerator.process_index
        groups = [row // self.num_generations for row in range(begin, begin + count)]
        known = {group: self.train_dataset[prompts[group]] for group in set(groups)}
        return [dict(known[group]) for group in groups]

    def _assemble(self: Any, prompts: list[Any]) -> tuple[Any, ...]:
        """Return the rollout as TRL's `_generate` does, and change TRL's lists of inputs and prompts to match."""
        rollout, first = self._rollout, self._rollout.rounds[0]
        rows = rollout.own_rows()
        self._inputs[:] = self._dataset_rows(rollout.prompts)
        prompts[:] = [row["prompt"] for row in self._inputs]
        unchecked = [each.unchecked for each in rollout.rounds if each.unchecked is not None]
        self._assembled = rollout.rewards(unchecked) if unchecked else None  # None if a subclass grades by itself
        self._pending_metrics.update(rollout.values())
        for column in {name for each in rollout.rounds for name in each.columns} | {n for _, c in rows for n in c}:
            self._pending_extra_logs[column] = [columns.get(column) for _, columns in rows]
        return tuple(
            [parts[index] for parts, _ in rows] if has_rows(part, len(rows)) else part
            for index, part in enumerate(first.generated)
        )

    def _calculate_rewards(self: Any, *args: Any) -> Tensor:
        if self._assembled is None:
            self._unchecked = super()._calculate_rewards(*args)  # type: ignore[misc]
            return self._unchecked
        rewards, self._assembled = self._assembled, None
        return rewards

    def _with_signal(self: Any, rewards: Tensor) -> Tensor:
        by_function = self.multi_objective_aggregation == "normalize_then_sum"
        return has_signal(rewards, self.reward_weights, self.num_generations, by_function)

    def _clear_rounding(self: Any, batch: dict[str, Any]) -> None:
        """Set the advantages of groups without a signal to 0. TRL divides what rounding leaves there by 1e-4, after
        which such rows are neither dropped nor taken for equal."""
        if self._signal is not None:  # else a subclass grades by itself
            batch["advantages"] = batch["advantages"].masked_fill(~self._own_signal(batch), 0)

    def _own_signal(self: Any, batch: dict[str, Any]) -> Tensor:
        """Return whether the group of each completion of this rank has a signal, (B,)."""
        rows, signal = len(batch["advantages"]), self._signal
        if signal is None:  # a subclass grades by itself
            signal = (self.accelerator.gather(batch["advantages"]).view(-1, self.num_generations) != 0).any(1)
        begin = self.accelerator.process_index * rows
        return signal.repeat_interleave(self.num_generations)[begin : begin + rows]

    def _counted_tokens(self: Any, batch: dict[str, Any]) -> Tensor:
        """Return the trained tokens over all ranks of groups with a signal, and of rows that the control pushes."""
        signal = self._own_signal(batch)
        counted = signal | batch[PUSHED] if PUSHED in batch else signal
        return self.accelerator.gather((trained_mask(batch) * counted.unsqueeze(1)).sum()).sum()

    @contextmanager
    def _metrics_apart(self: Any) -> Iterator[dict[str, list[float]]]:
        """Yield the metrics that are logged in this block, and keep them out of the run's."""
        shared, apart = self._metrics["train"], defaultdict(list)  # type: ignore[var-annotated]
        self._metrics["train"] = apart
        try:
            yield apart
        finally:
            self._metrics["train"] = shared

    def _log_rollout(self: Any, trained: dict[str, list[float]]) -> None:
        """Log metrics and completions of all rounds. `trained` are TRL's metrics of the assembled rollout."""
        rollout, metrics = self._rollout, self._metrics["train"]
        logged = {name: values[-1] for name, values in trained.items()} | rollout.metrics()
        if len(rollout.rounds) > 1:
            logged |= self._reward_metrics(torch.cat([each.rewards for each in rollout.rounds]))
            self._log_unused()
        logged |= {
            "batching/resampled_groups": rollout.graded - len(self._first),
            "batching/surplus_groups": rollout.surplus,
            "batching/signal_share": self._with_signal(rollout.rewards()).float().mean().item(),
            "batching/resample_time": self._seconds,
        }
        for name, value in logged.items():
            metrics[name] = [value] if name in COUNTERS else [*metrics[name], value]

    def _reward_metrics(self: Any, rewards: Tensor) -> dict[str, float]:
        """Return TRL's metrics of rewards, (completions, functions), over all that were generated."""
        total = weighted_sum(rewards, self.reward_weights)
        names = [f"rewards/{name}/" for name in self.reward_func_names]
        columns = dict(zip(names, rewards.T, strict=True))
        metrics = {f"{name}mean": values.nanmean().item() for name, values in columns.items()}
        metrics |= {f"{name}std": values[~values.isnan()].std().item() for name, values in columns.items()}
        flat = 1 - self._with_signal(rewards).float().mean().item()
        spread = total[~total.isnan()].std().item()
        return metrics | {"reward": total.nanmean().item(), "reward_std": spread, "frac_reward_zero_std": flat}

    def _log_unused(self: Any) -> None:
        """Append the completions that are not trained on to TRL's tables, with NaN for their advantage."""
        rollout, logs, mine = self._rollout, self._logs, []
        rewards = [each.rewards.tolist() for each in rollout.rounds]
        for number, row in rollout.unused():
            each = rollout.rounds[number]
            index = row - each.begin
            mine.append((number, row, each.texts[index], each.generated[_COMPLETIONS][index], each.row(row)[1]))
        for number, row, prompt, completion, columns in sorted(gather_object(mine), key=lambda entry: entry[:2]):
            logs["prompt"].append(prompt)
            logs["completion"].append(completion)
            logs["advantages"].append(math.nan)
            for name, reward in zip(self.reward_func_names, rewards[number][row], strict=True):
                logs["rewards"][name].append(reward)
            for column, values in logs["extra"].items():
                values.append(columns.get(column))


def check_trainer(trainer: Any) -> None:
    """Raise a `ValueError` for arguments of the trainer that fresh prompts cannot be generated with."""
    dataset = trainer.train_dataset
    columns = {"image", "images"} & set(getattr(dataset, "column_names", None) or [])
    refused = {
        f"a `train_dataset` that can be indexed, not a {type(dataset).__name__}": isinstance(dataset, IterableDataset),
        f"text; `train_dataset` has a column {min(columns, default=None)!r}": bool(columns),
        "TRL's own generation, not a `rollout_func`": trainer.rollout_func is not None,
        "prompts from the dataset, not from an `environment_factory`": trainer.environment_factories is not None,
    }
    for reason, is_so in refused.items():
        if is_so:
            raise ValueError(f"{_REFUSED} {reason}. {_OFF}")
