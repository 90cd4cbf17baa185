"""The flow of one optimizer step: measured from its tokens, and passed on to the control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from opefo_trl.flow import FlowTotals, flow_score, token_flow
from opefo_trl.training.rebatching import PUSHED
from opefo_trl.training.sampler_drift import SamplerDrift

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState

    from opefo_trl.config import OPEFOConfig
    from opefo_trl.controls import Control, Tokens
    from opefo_trl.training.scoring import Scores

_VESPO = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")  # options of its weights
_GOLDEN, _WHOLE = 40503, 65536  # in the golden ratio, whose multiples, modulo the whole, fill it evenly


@dataclass
class FlowStep:
    """
    Flow totals, lambdas and sampler drift of the optimizer step under way.

    `OPEFOTrainer` calls `begin` before the first micro-batch, `add` in each forward of the loss, and `end` after the
    last backward of the step, before the optimizer step. When `Control.observe` is called, and with which totals,
    depends on `flow_scope`: in `batch` the rollout's, before it is trained on; in `running` the previous step's; in
    `micro` each micro-batch's; in `batch` without a measured rollout, the previous step's.

    Attributes:
        rollout (`FlowTotals`, *optional*): totals of the generation batch, over all ranks.
        last (`FlowTotals`, *optional*): totals of the previous optimizer step, over all ranks.
        current (`FlowTotals`, *optional*): totals of the micro-batches so far, of this rank.
        lambdas (`list`): the lambda of each micro-batch so far.
        drift (`SamplerDrift`, *optional*): drift over the micro-batches so far, of this rank, if no scoring pass logs
            it.
    """

    args: OPEFOConfig
    control: Control
    accelerator: Accelerator
    rollout: FlowTotals | None = None
    last: FlowTotals | None = None
    current: FlowTotals | None = None
    lambdas: list[Tensor | float] = field(default_factory=list)
    drift: SamplerDrift | None = None

    def __post_init__(self) -> None:
        self.estimator = self.args.estimator_of(self.control)
        self.measuring = self.args.measuring(self.control)  # "ahead", "live" or "never"

    def measure_rollout(self, batch: dict[str, Any], mask: Tensor, scores: Scores) -> None:
        """Write the flow of each token, and of the control's push, into the generation batch; sum its totals over all
        ranks."""
        self._write_flow(batch, mask, scores.logps, scores.entropies, scores.vocabulary)
        self.rollout = self.totals_of(batch, mask, scores.entropies).reduce(self.accelerator)

    def measure(self, batch: dict[str, Any], mask: Tensor, logps: Tensor, entropies: Tensor) -> FlowTotals:
        """Return the totals of a micro-batch, and write into it what `measure_rollout` has not written before."""
        if "token_flow" not in batch:
            self._write_flow(batch, mask, logps, entropies)
        return self.totals_of(batch, mask, entropies)

    def totals_of(self, batch: dict[str, Any], mask: Tensor, entropies: Tensor) -> FlowTotals:
        """Return the totals of a batch, in which a token counts as much as in the loss."""
        flow = batch["token_flow"] * self._token_weight(batch, mask)
        return FlowTotals.of(flow, mask, entropies, batch.get("push"), batch.get("push_flow"))

    def _write_flow(
        self, batch: dict[str, Any], mask: Tensor, logps: Tensor, entropies: Tensor, vocabulary: Tensor | None = None
    ) -> None:
        """Write `token_flow`, (B, T), and the push with its flow, if the control makes one."""
        advantages = batch["advantages"].unsqueeze(1)
        flow = token_flow(
            logps,
            entropies,
            advantages,
            self.estimator,
            mask=mask,
            vocabulary=vocabulary,
            accelerator=None if self.measuring == "never" else self.accelerator,
        )
        # `covariance` gives a flow to tokens without an advantage as well; they have no gradient.
        batch["token_flow"] = flow.masked_fill(advantages == 0, 0)
        push = self.control.push(logps, entropies)
        if push is not None and PUSHED not in batch:  # a subclass makes its rollouts by itself
            self.mark_pushed(batch, None)
        if push is not None and PUSHED in batch:
            strength, unit = self._penalty_weights(batch)
            batch["push"] = push * strength * batch[PUSHED].unsqueeze(1)
            batch["push_flow"] = batch["push"] * flow_score(logps, entropies, self.estimator, vocabulary) * unit

    def mark_pushed(self, batch: dict[str, Any], right: Tensor | None) -> None:
        """Mark the completions of a rollout that the control pushes whatever their advantage. `right` is (B,); None
        takes the better ones of each group for right."""
        advantages = batch["advantages"].unsqueeze(1)
        right = advantages > 0 if right is None else right.unsqueeze(1)
        pushed = self.control.pushes(advantages, right)
        if pushed is None:
            return
        if self.args.flow_scope == "batch":  # in other scopes lambda comes from totals of other rows
            # By their place and not by chance: the same rows on any number of ranks, and in a run that is resumed
            first = self.accelerator.process_index * len(advantages)
            places = torch.arange(first, first + len(advantages), device=advantages.device).unsqueeze(1)
            pushed = pushed & ((advantages != 0) | (places * _GOLDEN % _WHOLE < self.control.flat_share * _WHOLE))
        batch[PUSHED] = pushed.squeeze(1)

    def _token_weight(self, batch: dict[str, Any], mask: Tensor) -> Tensor | float:
        """Return the weight of each token in the loss, up to a factor for all."""
        weight: Tensor | float = 1.0
        # TRL's loss multiplies by vLLM's importance-sampling ratio: a token that it masks out moves nothing.
        ratio = batch.get("importance_sampling_ratio")
        if ratio is not None and self.args.loss_type == "vespo":  # by a function of the completion's ratio
            of_vespo = {name: getattr(self.args, f"vespo_{name}") for name in _VESPO}
            zeros = torch.zeros_like(ratio)  # the policy has not moved since
            weight = GRPOTrainer.get_gamma_weights(batch["advantages"].unsqueeze(1), zeros, mask, ratio, **of_vespo)
        elif ratio is not None:
            weight = ratio
        # These losses average each completion separately, so a token of a short one has more weight
        if self.args.loss_type in ("grpo", "sapo"):
            longest = self.args.max_completion_length or 1  # any factor for all does
            weight = weight * (longest / mask.sum(1, keepdim=True).clamp(min=1))
        return weight * self._cispo_bound

    @property
    def _cispo_bound(self) -> float:
        """Return what CISPO's bound leaves of a token's weight on-policy, where its ratio is 1; 0.2 by default."""
        if self.args.loss_type != "cispo":
            return 1.0
        return min(1.0, self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high)

    def _penalty_weights(self, batch: dict[str, Any]) -> tuple[Tensor | float, Tensor | float]:
        """Return how much more a token weighs in a penalty, which is a mean over tokens, than it does in the loss on
        average, and the average of `_token_weight`."""
        if self.args.loss_type not in ("grpo", "sapo", "dr_grpo", "luspo"):
            return 1 / max(self._cispo_bound, 1e-6), self._cispo_bound
        mean_length = batch["num_items_in_batch"].clamp(min=1) / self.args.generation_batch_size
        longest = self.args.max_completion_length or 1
        if self.args.loss_type in ("grpo", "sapo"):
            return 1.0, longest / mean_length
        return (longest if self.args.loss_type == "dr_grpo" else 1) / mean_length, 1.0

    def begin(self, state: TrainerState, learning_rate: float, optimizer: Any, skipped: bool = False) -> None:
        """Pass the control what is known before the first micro-batch: how large the update will be, whether the last
        one was `skipped`, and totals."""
        control, is_live, is_micro = self.control, self.measuring == "live", self.args.flow_scope == "micro"
        control.learning_rate, control.momentum = learning_rate, first_moment_decay(optimizer)
        control.updated = not (skipped or self.accelerator.optimizer_step_was_skipped)  # by a guard; by fp16's scaler
        has_rollout = self.args.flow_scope == "batch" and self.rollout is not None
        control.delayed = None if has_rollout or is_live else "entropy" if is_micro else "totals"
        if is_micro or is_live:
            return
        totals = self.rollout if has_rollout else self.last
        if totals is not None:
            self._observe(totals, state)

    def add(self, totals: FlowTotals, trains: bool, state: TrainerState) -> None:
        """
        Add a micro-batch, and pass its totals to the control where `flow_scope` asks for them.

        `trains` is False for dropped rows, which come before the micro-batch with a gradient.
        """
        self.current = totals if self.current is None else self.current + totals
        if not trains:
            return
        if self.measuring == "live":  # one micro-batch, with the dropped rows before it, is the whole batch
            self.rollout = self.current.reduce(self.accelerator)
            self._observe(self.rollout, state)
        elif self.args.flow_scope == "micro":
            # Lambda follows the micro-batch; a target is compared with the entropy of the last whole step.
            unknown = torch.full_like(totals.entropy, torch.nan)
            self._observe(totals.with_entropy(unknown if self.last is None else self.last.entropy), state)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return the control's advantages for the loss, (B, 1) or (B, T)."""
        advantages = self.control.advantages(tokens)
        if not (isinstance(advantages, Tensor) and advantages.dim() == 2):
            raise TypeError(
                f"`advantages()` of `control={self.args.control!r}` returned {advantages!r}; return a tensor, (B, 1) "
                "or (B, T)."
            )
        return advantages

    def penalty(self, tokens: Tokens, rollout_tokens: Tensor, accumulation: int) -> Tensor | None:
        """
        Return a micro-batch's part of the mean of the control's penalty over all tokens of the step, on all ranks.

        `rollout_tokens` is TRL's `num_items_in_batch`: trained tokens of the generation batch, over all ranks.
        """
        penalty = self.control.penalty(tokens)
        if penalty is None:
            return None
        if penalty.shape != tokens.mask.shape:
            raise TypeError(
                f"`penalty()` of `control={self.args.control!r}` returned a tensor of shape {tuple(penalty.shape)}; "
                f"return one term for each token, {tuple(tokens.mask.shape)}."
            )
        steps = self.args.steps_per_generation / accumulation
        # Gradients are averaged over ranks
        step_tokens = rollout_tokens.clamp(min=1) / steps / self.accelerator.num_processes
        return (penalty * tokens.mask).sum() / step_tokens

    def record_lambda(self) -> None:
        self.lambdas.append(self.control.metrics().get("flow/lambda", 0.0))

    def add_drift(self, drift: SamplerDrift) -> None:
        self.drift = drift if self.drift is None else self.drift + drift

    def end(self) -> tuple[dict[str, float], float]:
        """
        Return metrics and entropy of the step, with one transfer to the host, and reset for the next one.

        The totals are those of the generation batch if one step trains on all of it, else the sum of the micro-batches
        over all ranks.
        """
        assert self.current is not None
        if self.rollout is not None and self.args.updates_per_rollout == 1:
            totals = self.rollout
        else:
            totals = self.current.reduce(self.accelerator)
        # The control may have had the totals transferred already: then nothing is left on the device
        shown = totals.on_host if "on_host" in vars(totals) else totals
        metrics: dict[str, Tensor | float] = {**shown.metrics(), "flow/lambda": sum(self.lambdas) / len(self.lambdas)}
        if self.last is not None:
            metrics["entropy/delta"] = shown.entropy - self.last.entropy.to(shown.sums.device)
        for name, value in self.control.metrics().items():
            metrics.setdefault(name if "/" in name else f"control/{name}", value)
        tensors = [torch.as_tensor(number, device=shown.sums.device) for number in metrics.values()]
        entropy, *numbers = torch.stack([number.float() for number in (shown.entropy, *tensors)]).tolist()
        drift = {} if self.drift is None else self.drift.metrics(self.accelerator)
        self.last, self.current, self.lambdas, self.drift = shown, None, [], None
        return {**dict(zip(metrics, numbers, strict=True)), **drift}, entropy

    def _observe(self, totals: FlowTotals, state: TrainerState) -> None:
        self.control.observe(totals, state.global_step, state.max_steps)


def first_moment_decay(optimizer: Any) -> float:
    """Return how much of the last average gradient an optimizer keeps in the next, 0 for one that averages none."""
    group = optimizer.param_groups[0]
    betas = group.get("betas") or (group.get("momentum"),)
    return float(betas[0] or 0.0)
