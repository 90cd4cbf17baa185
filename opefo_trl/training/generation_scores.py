"""Log-probabilities, entropies and vocabulary sums of a rollout, taken from the logits that transformers sampled it
from: what a scoring pass gives, without its forward.

A forward hook sees the logits of each sampled token once. Those of one position are kept until the next forward tells
which token was sampled, and no longer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from opefo_trl.flow import VOCABULARY_ESTIMATORS, vocabulary_sum
from opefo_trl.training.sampler_drift import SamplerDrift
from opefo_trl.training.scoring import Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from opefo_trl.config import OPEFOConfig

__all__: list[str] = []  # of use inside this package only

# Mean difference in nats to the training forward above which the scores of generation are not used any more
_MAX_GAP, _MAX_GAP_16_BIT = 1e-3, 0.05
_DIFFERENT = "generation and training forward differ"
_BUDGET = 2**24  # logits that are worked on at once


class GenerationScores:
    """
    Collects the scores of a rollout while it is generated.

    Args:
        estimator (`str`): flow estimator; `exact` and `expected` need vocabulary sums.
        temperature (`float`): sampling temperature, which divides the logits.
        reason (`str`, *optional*): why no scores can be collected in this run, see `reason_against`.
        half (`bool`): whether the model computes in bf16 or fp16.
    """

    def __init__(self, estimator: str, temperature: float, reason: str | None, half: bool = False):
        self.estimator, self.temperature, self.reason = estimator, temperature, reason
        self._limit = _MAX_GAP_16_BIT if half else _MAX_GAP
        self.taken = False  # whether the rollout under way has scores
        self.confirmed = False  # whether the training forward has given the same, or cannot
        self.dropped = False  # whether it has given others
        self.moves_rows = False  # whether another process may train on a row than the one that generated it
        self._explained = False
        self._gap: SamplerDrift | None = None  # to the training forward, in the first step
        self._turns: list[_Turn] = []

    @classmethod
    def for_run(
        cls, args: OPEFOConfig, estimator: str, model: PreTrainedModel, positions: str, rollout_func: Any, needed: bool
    ) -> GenerationScores:
        """Return the `GenerationScores` of a run; `positions` is `positions_of` the model's config, and `needed` tells
        whether the run has a use for them."""
        half = args.bf16 or args.fp16 or model.dtype != torch.float32
        reason = reason_against(args, positions, rollout_func is not None) if needed else "nothing needs them"
        made = cls(estimator, args.temperature, reason, half)
        # With dropout no two forwards agree, and a scoring pass would be no nearer to the training forward
        made.confirmed = has_dropout(model)
        made.moves_rows = args.resample_rounds > 0 and args.world_size > 1
        return made

    def state_dict(self) -> dict[str, bool]:
        """Return what a resumed run must know to measure as an uninterrupted one does."""
        return {"confirmed": self.confirmed, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.confirmed, self.dropped = state["confirmed"], state["dropped"]
        if self.dropped:
            self.reason = self.reason or _DIFFERENT

    def collect(
        self, generate: Callable[..., Any], model: PreTrainedModel, prompts: list, images: Any, *args: Any
    ) -> Any:
        """Return the completions and log-probabilities of TRL's `generate`; in training, keep the tokens' scores."""
        if not model.training or self.reason is not None or images is not None:
            return generate(prompts, images, *args)
        turn = _Turn(self, prompts)
        base: Any = getattr(model, "get_base_model", lambda: model)()  # of PEFT's
        handle = base.register_forward_hook(turn.measure, with_kwargs=True)
        try:
            completions, logprobs = generate(prompts, images, *args)
        finally:
            handle.remove()
        turn.end(completions)
        self._turns.append(turn)
        return completions, logprobs

    def take(self, batch: dict[str, Any], mask: Tensor, accelerator: Accelerator) -> Scores | None:
        """Return the scores of a generation batch and forget them; None if any rank lacks that of a trained token."""
        turns, self._turns = self._turns, []
        self.taken = False
        if self.reason is not None:
            return None
        ids = batch["completion_ids"]
        if len(turns) == 1 and "tool_mask" not in batch:  # its rows are the batch's
            tensors = [F.pad(each, (0, ids.size(1) - each.size(1))) for each in turns[0].tensors]  # or cropped
        else:
            tensors = _placed(turns, batch, mask)
        have = _on_all_ranks(bool(tensors), accelerator)
        complete = all(turn.tensors for turn in turns)
        if not have and self.moves_rows and _on_all_ranks(complete, accelerator):
            # As the rows have travelled, so do their scores. Those of a first turn stay, except where tools make more
            own = [] if "tool_mask" in batch else turns[:1]
            moved = gather_object([turn.for_another_process() for turn in turns[len(own) :]])
            tensors = _placed([*own, *moved], batch, mask)
            have = _on_all_ranks(bool(tensors), accelerator)
        self.taken = have
        return Scores(tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None) if have else None

    def explain(self) -> str | None:
        """Return why a scoring pass is used, the first time it is called, and None after that."""
        if self._explained:
            return None
        self._explained = True
        why = self.reason or "generation did not show the logits of all its tokens"
        return f"A scoring pass measures the flow of rollouts, since {why}."

    def compare(self, batch: dict[str, Any], logps: Tensor, mask: Tensor) -> None:
        """Compare the scores with the training forward of a micro-batch, in the first step that has them."""
        if self.taken and not self.confirmed:
            gap = SamplerDrift.measure(logps, batch["logps"], mask, torch.ones_like(logps), per_sequence=False)
            self._gap = gap if self._gap is None else self._gap + gap

    def judge(self, accelerator: Accelerator) -> str | None:
        """Stop using the scores if they are far from those of the training forward, and return a warning."""
        if self._gap is None:
            return None
        total, tokens, *_ = accelerator.reduce(self._gap.sums, reduction="sum").tolist()
        self._gap = None
        if not tokens or math.isnan(total):  # nothing was compared; NaN is StepGuard's to find
            return None
        gap = total / tokens
        self.confirmed = gap <= self._limit
        if self.confirmed:
            return None
        self.dropped, self.reason = True, _DIFFERENT
        return (
            f"The log-probabilities of generation are {gap:.2g} nats from those of the training forward on average, "
            f"more than rounding explains ({self._limit:g}). From now on they are not used: where the flow of a "
            "rollout is needed before training, a scoring pass measures it. Likely causes: another attention "
            "kernel in generation, or `generation_kwargs` that change how the model computes."
        )


def reason_against(args: OPEFOConfig, positions: str, own_rollouts: bool) -> str | None:
    """
    Return why a run cannot take its scores from generation, or None.

    Args:
        args (`OPEFOConfig`): settings of generation.
        positions (`str`): `positions_of` the model's config.
        own_rollouts (`bool`): whether a `rollout_func` generates.
    """
    if own_rollouts:
        return "`rollout_func` generates the rollouts"
    if args.use_vllm:
        return "vLLM generates the rollouts"
    if args.use_transformers_continuous_batching:
        return "`use_transformers_continuous_batching` generates the rollouts"
    if args.spans_updates:
        return "TRL scores each rollout itself where several updates are made on it"
    if positions != "relative":  # training counts padding on the left as positions, generation does not
        return "the model's position embedding depends on padding or on the sequence length"
    cache = args.cache_implementation or (args.generation_kwargs or {}).get("cache_implementation")
    return None if cache is None else f"`cache_implementation={cache!r}` may compile the model's forward"


def has_dropout(model: PreTrainedModel) -> bool:
    """Return whether a training forward of the model is random."""
    attention = getattr(model.config.get_text_config(), "attention_dropout", None) or 0.0
    return attention > 0 or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


class _Turn:
    """One call of `generate`: the tokens it was given, those it sampled, and the scores of these."""

    def __init__(self, settings: GenerationScores, prompts: list[list[int]]):
        self.prompts, self.completions = prompts, list[list[int]]()
        self.tensors: list[Tensor] = []  # log-probabilities, entropies, sums, (B, T); empty if a token lacks them
        self._temperature = settings.temperature
        self._estimator = settings.estimator if settings.estimator in VOCABULARY_ESTIMATORS else None
        self._last: tuple[Tensor, Tensor] | None = None  # logits of the last position, (B, V), and their log-sum-exp
        self._positions: list[list[Tensor]] = []  # for each: entropies, sums, log-probabilities, sampled tokens

    @torch.no_grad()
    def measure(self, _module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Take in one forward of generation: the tokens that were sampled last, and the logits of the next ones."""
        ids = kwargs.get("input_ids")
        if ids is None:  # embeddings in place of tokens
            return
        if self._last is not None:
            self._sampled(ids[:, -1])
        logits = output.logits[:, -1]
        parts = [self._measure(rows) for rows in logits.split(max(1, _BUDGET // logits.size(-1)))]
        scaled, norms, *scores = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        self._last = scaled, norms
        self._positions.append(scores)

    def _measure(self, logits: Tensor) -> list[Tensor]:
        """Return logits at the sampling temperature, their log-sum-exp, entropies and, for some estimators, sums, of
        some rows. Log p = logit - log-sum-exp is needed of single tokens: to write it out for all would be one more
        pass over the vocabulary."""
        logits = logits.float() if self._temperature == 1 else logits.float() / self._temperature
        p = logits.softmax(-1)
        total = p.sum(-1)  # 1, up to the rounding of a large vocabulary
        norms = logits.amax(-1) - (p.amax(-1) / total).log()  # of the likeliest token, whose p is far from underflow
        entropies = norms - (p * logits).sum(-1) / total
        if self._estimator is None:
            return [logits, norms, entropies]
        likely = logits + (entropies - norms).unsqueeze(-1)
        return [logits, norms, entropies, vocabulary_sum(p, likely, self._estimator)]

    def end(self, completions: list[list[int]]) -> None:
        """Take in the completions, which may be cut short, and check that their tokens are those that were seen."""
        self.completions, width = list(completions), max(map(len, completions))  # TRL adds to its list
        if self._last is None or len(self._last[0]) != len(completions) or len(self._positions) < width:
            return  # embeddings, beams, several tokens in a forward
        device = self._last[0].device
        padded = torch.tensor([ids + [-1] * (width - len(ids)) for ids in completions], device=device)
        if len(self._positions) == width:
            self._sampled(padded[:, -1].clamp(min=0))
        self._last = None
        *scores, logps, tokens = (torch.stack(column, dim=1) for column in zip(*self._positions[:width], strict=True))
        if ((tokens == padded) | (padded == -1)).all():
            self.tensors = [logps, *scores]

    def for_another_process(self) -> _Turn:
        """Return a copy on the CPU, with what is needed to place its scores and no more."""
        turn = copy.copy(self)
        turn.tensors, turn._last, turn._positions = [tensor.cpu() for tensor in self.tensors], None, []
        return turn

    def _sampled(self, tokens: Tensor) -> None:
        assert self._last is not None
        logits, norms = self._last
        self._positions[-1] += [logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - norms, tokens]


def _on_all_ranks(flag: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).all())


def _placed(turns: list[_Turn], batch: dict[str, Any], mask: Tensor) -> list[Tensor]:
    """
    Return the scores of several calls in the places of their tokens, none if a trained token has none.

    A call has other rows than the batch where tools wrote between two turns of a row, and where groups were replaced.
    So each part of a row that was sampled in one call is found by its tokens and all those before it; equal tokens
    have equal scores.
    """
    if not turns or not all(turn.tensors for turn in turns):
        return []
    sampled: dict[tuple[int, ...], list[tuple[_Turn, int]]] = {}
    for turn in turns:
        for row, prompt in enumerate(turn.prompts):
            sampled.setdefault(tuple(prompt), []).append((turn, row))
    placed = [mask.new_zeros(mask.shape, dtype=torch.float32) for _ in turns[0].tensors]
    prompts = batch["prompt_mask"].sum(1).tolist()
    padded = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1).tolist()
    for number, (length, row, trained) in enumerate(zip(prompts, padded, mask.tolist(), strict=True)):
        tokens = row[batch["prompt_ids"].size(1) - length :]
        edges = [place for place, (a, b) in enumerate(zip([0, *trained], [*trained, 0], strict=True)) if a != b]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            part = tokens[length + start : length + end]
            candidates = sampled.get(tuple(tokens[: length + start]), [])
            found = next(((turn, one) for turn, one in candidates if turn.completions[one][: len(part)] == part), None)
            if found is None:
                return []
            turn, one = found
            for target, tensor in zip(placed, turn.tensors, strict=True):
                target[number, start:end] = tensor[one, : end - start]
    return placed
