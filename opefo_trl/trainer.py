"""`OPEFOTrainer`: TRL's `GRPOTrainer` with an entropy control between the log-probabilities and the loss.

TRL keeps generation, rewards, losses and everything around them. This file is the only one that knows its private
hooks, each held in place by a test in tests/test_trl_contract.py:

    _generate_and_score_completions          the whole generation batch: measure its flow, all-reduce, fix lambda
    _prepare_inputs, _buffered_inputs        a rollout's micro-batches: make them exact
    _get_per_token_logps_and_entropies       called by TRL's loss before it reads the advantages: shape them here
    compute_loss, training_step              open and close the window of micro-batches of one optimizer step
    _calculate_rewards, _get_grad_norm       the last places where a NaN can be caught
    _save_checkpoint, _load_optimizer_and_scheduler, _run_epoch
    _metrics                                 what TRL and the controls measured, a list for each name, cleared by `log`
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, is_async_callable

from opefo_trl.config import OPEFOConfig
from opefo_trl.controls import Tokens
from opefo_trl.curves import EntropyCurves
from opefo_trl.files import write_whole
from opefo_trl.flow import VOCABULARY_ESTIMATORS, FlowTotals, token_flow
from opefo_trl.hub.mixin import HubMixin
from opefo_trl.playground import resolve_model
from opefo_trl.training.answer_diversity import RIGHT, distinct_right, names_of
from opefo_trl.training.guards import CollapseGuard, DriftGuard, MicroBatch, NonFiniteError, StepGuard, watch_reward
from opefo_trl.training.microbatches import MEANS, Means, Parts, columns, positions_of, spread, trained_mask
from opefo_trl.training.rebatching import PLACE, Alone, Batching
from opefo_trl.training.recorder import Recording
from opefo_trl.training.sampler_drift import Drift, importance_ratio
from opefo_trl.training.vocabulary_scores import vocabulary_scores

logger = get_logger(__name__)

STATE_FILE = "control_state.json"
REWARDS_SHOWN = 3
DRIFT = "sampling/sampling_logp_difference/mean"
# What a forward takes beside text makes a batch multimodal
MULTIMODAL = set(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters) - {
    *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    *("compute_entropy", "compute_aux_loss"),
}


class OPEFOTrainer(HubMixin, GRPOTrainer):
    """
    Trainer for GRPO with entropy-flow control: On-Policy Entropy Flow Optimization (OPEFO) and its kin.

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`OPEFOConfig`] as `args`. The model `"playground"` is the
    tiny one that comes with this package.

    Attributes:
        curves ([`~opefo_trl.curves.EntropyCurves`]): the steps so far; `trainer.curves.plot()` draws them. None with
            `entropy_curves=False`, and on all ranks but the first.
        publisher ([`~opefo_trl.hub.Publisher`]): what pushes to the Hub; `trainer.publisher.report()` lists every save
            and what became of it. None without `push_to_hub`, and on all ranks but the first.
        run_facts ([`~opefo_trl.hub.model_card.RunFacts`]): what the model card says beyond what a trainer knows.

    Example:

    ```python
    from opefo_trl import OPEFOConfig, OPEFOTrainer

    trainer = OPEFOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=my_reward,
        args=OPEFOConfig("out", control="opefo", flow_target="0.4x"),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "opefo"]
    _name = "OPEFO"
    _paper = {
        "title": "On-Policy Entropy Flow Optimization",
        "id": "2605.11491",
        "citation": textwrap.dedent("""\
            @article{opefo2026,
                title  = {{On-Policy Entropy Flow Optimization}},
                year   = 2026,
                eprint = {arXiv:2605.11491},
            }"""),
    }

    args: OPEFOConfig
    reward_funcs: list[Any]
    accelerator: Any
    epsilon_low: Any
    epsilon_high: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OPEFOConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        model = resolve_model(model)
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OPEFOConfig(f"{name.split('/')[-1]}-OPEFO")
        if not isinstance(args, OPEFOConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; OPEFOTrainer needs an OPEFOConfig. It takes every argument of "
                "GRPOConfig: replace the name."
            )
        if args.use_vllm and args.use_cpu and args.vllm_mode == "colocate":
            from opefo_trl import vllm_cpu

            vllm_cpu.adapt("bfloat16" if args.bf16 else "float32")
        if args.control != "opefo":  # the model card gives the credit where it is due
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper
            self._tag_names = [*GRPOTrainer._tag_names, *([args.control] if args.control != "none" else [])]
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        self._scoring_pass: list[tuple[Tensor, Tensor, Tensor | None]] | None = None  # of the scoring pass under way
        self._loss_inputs: dict[str, Any] | None = None  # inputs of the loss under way
        self._loss_trains = False  # whether it is for its gradient, or only for its metrics
        self._ranks = self.accelerator  # also while TRL's loss takes its metrics alone
        self._tokens: Tokens | None = None

        self.reward_funcs = [
            function if isinstance(function, nn.Module) else watch_reward(function, name, is_async_callable(function))
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self.recording = Recording(self)
        self.add_callback(self.recording)
        self._begin()
        self._seed_vllm(0)

    def _begin(self) -> None:
        """The state that a run begins with, whatever a run before it left."""
        args = self.args
        self.entropy_control = args.make_control()
        self._estimator = args.estimator_of(self.entropy_control)
        self._needs_vocabulary = self._estimator in VOCABULARY_ESTIMATORS
        self._measuring = args.measuring(self.entropy_control)
        self._corrects_live = args.corrects_live(self.entropy_control)
        self._measures_drift = self._corrects_live or (
            args.use_vllm and not args.corrects_vllm and args.updates_per_rollout == 1
        )
        parts = Parts.of(args, self.entropy_control, positions_of(self.model.config), self.aux_loss_enabled)
        self.batching = self._make_batching(parts)
        by_rows = {name for name in MEANS if "clip" in name and args.importance_sampling_level == "sequence"}
        if not self.entropy_control.shapes_tokens:  # by the shape of the advantages
            by_rows.add("vespo/phi_seq_mean")
        self._means = Means(by_rows)
        self._drift: Drift | None = None  # of the optimizer step under way, where no scoring pass tells it
        self.drift_guard, self.collapse_guard = DriftGuard(args.sampling_drift_max), CollapseGuard()
        self.guard = StepGuard(args.nonfinite, Path(args.output_dir) / "nonfinite", self._tokenizer.decode)
        self._rollout_is_bad = self._window_is_bad = False  # by its rewards
        self._batch_totals: FlowTotals | None = None  # of the generation batch, over all ranks
        self._last_totals: FlowTotals | None = None  # of the last optimizer step, over all ranks
        self._window_totals: FlowTotals | None = None  # of the optimizer step under way, this rank's
        self._window_lambdas: list[Tensor | float] = []
        self._step, self._buffered_inputs = 0, None  # TRL's: an interrupted run leaves them inside a rollout
        self._metrics["train"].clear()
        self._rollout_rewards: Tensor | None = None  # of this rank's completions, (B,)
        self._rollout_solved: Tensor | None = None  # share of right answers in the group of each, (B,)
        self.recording.begin()

    def _make_batching(self, parts: Parts) -> Batching:
        accumulation = self.args.gradient_accumulation_steps
        return Batching(parts, self.accelerator, self.loss_type, accumulation, self.pad_to_multiple_of)

    def _say_parts(self) -> None:
        if self.args.micro_batching == "exact":
            say = logger.warning if self.batching.parts.reasons else logger.info
            say(str(self.batching.parts))

    def _seed_vllm(self, step: int) -> None:
        """
        An engine in this process draws from the process' random numbers, and sets them to its rank when it starts:
        every run, and every resumed part of one, would sample with the same noise.
        """
        if self.args.use_vllm and self.args.vllm_mode == "colocate":
            group = self.accelerator.process_index // self.args.vllm_tensor_parallel_size  # which samples as one
            set_seed(self.args.seed + group + step * self.accelerator.num_processes)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        self._say_parts()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.recording.end()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the Trainer would take one more step
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    @property
    def curves(self) -> EntropyCurves | None:
        return self.recording.curves if self.recording.active else None

    # ---- the generation batch: measure its flow before anything is trained on it

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._scoring_pass = []
        try:
            with self._corrected_later() if self._corrects_live else nullcontext():
                batch = super()._generate_and_score_completions(inputs)
            # The rewards travel with the batch: TRL shuffles its rows, and the curves show some of them.
            batch["reward"], batch["solved"] = self._rollout_rewards, self._rollout_solved
            if self.args.corrects_vllm and not self._corrects_live:
                self._look_at_drift()
            # Strictly on-policy without vLLM, TRL has no use for a scoring pass: then it is ours to run.
            logps = batch.get("old_per_token_logps")
            if logps is None and self._measuring == "ahead":
                logps = self._score(batch)
            # With a PEFT adapter the reference pass is scored as well; the policy's is the one that was kept.
            scores = [scores for scores in self._scoring_pass if scores[0] is logps]
        finally:
            self._scoring_pass = None
        for logps, entropies, vocabulary in scores:
            if self.args.updates_per_rollout == 1 and self.batching.parts.drop:  # still true when it is trained on
                batch["logps"], batch["entropies"] = logps, entropies
            if self._measuring == "ahead":
                mask = trained_mask(batch)
                batch["token_flow"] = self._flow(batch, mask, logps, entropies, vocabulary)
                self._batch_totals = FlowTotals.of(batch["token_flow"], mask, entropies, batch["advantages"]).reduce(
                    self.accelerator
                )
        return batch

    @contextmanager
    def _corrected_later(self) -> Iterator[None]:
        """TRL scores no rollout here: `_correct` computes its ratio in the forward that trains."""
        self.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = True

    def _look_at_drift(self) -> None:
        warning = self.drift_guard.look(self._metrics["train"][DRIFT][-1], self.state.global_step + 1)
        if warning is not None:
            logger.warning(warning)

    def _score(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of the generation batch, as TRL's own scoring pass computes them, (B, T)."""
        multimodal = {name: value for name, value in batch.items() if name in MULTIMODAL}
        with torch.no_grad(), self._no_checkpointing():
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **multimodal,
            )
        return logps

    def _no_checkpointing(self) -> Any:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if batch_size is not None:  # TRL's word for a scoring pass
            return self._score_rows(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        live = self._loss_inputs
        if live is not None and not self._loss_trains and "entropies" in live:
            logps, entropies, aux_loss = live["logps"], live["entropies"], None
        else:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **kwargs
            )
        if live is not None:
            self._shape(live, logps, entropies)
        return logps, entropies, aux_loss

    def _score_rows(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, batch_size: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's scoring pass, less the padding; what it found of the policy is kept for the flow."""
        score = super()._get_per_token_logps_and_entropies
        is_policy = self._scoring_pass is not None and model is self.model
        kwargs["compute_entropy"] = is_policy

        def forward(ids: Tensor, mask: Tensor, keep: int, **more: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
            with self._vocabulary_scores(keep) if is_policy else nullcontext([]) as sums:
                logps, entropies, _ = score(model, ids, mask, keep, **kwargs, **more)
            return logps, entropies, torch.cat(sums) if sums else None

        if self.batching.parts.trim and all(kwargs.get(name) is None for name in MULTIMODAL):
            groups = self.batching.scoring_groups(attention_mask, keep, batch_size)
            scores = [forward(*columns(input_ids, attention_mask, keep, group), group.completion) for group in groups]
            logps, entropies, vocabulary = (spread(parts, groups, keep) for parts in zip(*scores, strict=True))
        else:
            logps, entropies, vocabulary = forward(input_ids, attention_mask, keep, batch_size=batch_size)
        assert logps is not None
        if self._scoring_pass is not None and entropies is not None:
            self._scoring_pass.append((logps, entropies, vocabulary))
        return logps, entropies, None

    def _vocabulary_scores(self, logits_to_keep: int) -> Any:
        if not self._needs_vocabulary:
            return nullcontext([])
        model = self.accelerator.unwrap_model(self.model)
        return vocabulary_scores(
            model.get_base_model() if hasattr(model, "get_base_model") else model,
            estimator=self._estimator,
            temperature=self.temperature,
            keep=logits_to_keep,
            head_in_fp32=self.args.cast_lm_head_to_fp32,
        )

    def _flow(
        self, batch: dict[str, Any], mask: Tensor, logps: Tensor, entropies: Tensor, vocabulary: Tensor | None = None
    ) -> Tensor:
        """`token_flow` of the update that the loss would make without a control, (B, T)."""
        flow = token_flow(
            logps,
            entropies,
            batch["advantages"],
            self._estimator,
            mask=mask,
            vocabulary=vocabulary,
            accelerator=None if self._measuring == "never" else self._ranks,
        )
        # TRL multiplies the loss by vLLM's importance-sampling ratio: a token it masks out moves nothing.
        ratio = batch.get("importance_sampling_ratio")
        if ratio is not None and self.loss_type != "vespo":
            flow = flow * ratio
        # These losses average each completion by itself: a token of a short one moves more.
        if self.loss_type in ("grpo", "sapo"):
            flow = flow * (self.max_completion_length / mask.sum(1, keepdim=True).clamp(min=1))
        # `covariance` gives a flow to tokens without an advantage as well; they do not train.
        return flow.masked_fill(batch["advantages"].unsqueeze(1) == 0, 0)

    # ---- the window: the micro-batches of one optimizer step

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or not self.batching.parts.trim:
            return inputs
        if self._anywhere(bool(MULTIMODAL & set(inputs))):
            self.batching = self._make_batching(Parts.none("images have rows of their own"))
            self._say_parts()
            return inputs
        self._buffered_inputs = self.batching.regroup(self._buffered_inputs, self._means)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _anywhere(self, has_images: bool) -> bool:
        """Whether any rank's rollout has images, so that all ranks group their rows in the same way."""
        if not self._is_vlm:
            return has_images
        flag = torch.tensor([has_images], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.guard.window:
            self._open_window()
        place = inputs.get(PLACE)
        for dropped in place.dropped if place else []:
            with torch.no_grad(), self._no_checkpointing(), self._loss_of(dropped) as rows:
                super().compute_loss(self.model, rows, return_outputs, num_items_in_batch)
        with self._loss_of(inputs, trains=True) as live:
            loss = super().compute_loss(model, live, return_outputs, num_items_in_batch)
            assert self._tokens is not None, "TRL's loss no longer asks for log-probabilities"
            if place and place.share != 1:
                loss = loss * place.share
            penalty = self.entropy_control.penalty(self._tokens)
            if penalty is not None:
                loss = loss + self._mean_over_step(penalty, self._tokens.mask, live["num_items_in_batch"])
            self._record(live, self._tokens, loss)
            self._window_is_bad |= self._rollout_is_bad
        if self.args.updates_in_backward:
            self._check_step(loss.detach(), None)
        return loss

    @contextmanager
    def _loss_of(self, inputs: dict[str, Any], trains: bool = False) -> Iterator[dict[str, Any]]:
        """A copy of a micro-batch for TRL's loss, which `_shape` may change; and TRL's metrics of it taken in."""
        kept = self.epsilon_low, self.epsilon_high, self.accelerator
        self._loss_inputs, self._loss_trains = {**inputs}, trains
        if self.batching.uneven:
            self.accelerator = Alone(self.accelerator)
        try:
            yield self._loss_inputs
        finally:
            self._loss_inputs = self._tokens = None
            self.epsilon_low, self.epsilon_high, self.accelerator = kept
        if self.batching.uneven:
            self._means.take(self._metrics["train"], inputs[PLACE].rows, inputs[PLACE].tokens)

    def _mean_over_step(self, values: Tensor, mask: Tensor, rollout_tokens: Tensor) -> Tensor:
        """A micro-batch's part of the mean of `values` over all tokens of the optimizer step, on all ranks."""
        if values.shape != mask.shape:
            raise TypeError(
                f"`penalty()` of `control={self.args.control!r}` returned a tensor of shape {tuple(values.shape)}; "
                f"return one term for each token, {tuple(mask.shape)}."
            )
        steps = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        # Gradients are averaged over ranks
        tokens = rollout_tokens.clamp(min=1) / steps / self.accelerator.num_processes
        return (values * mask).sum() / tokens

    def _shape(self, live: dict[str, Any], logps: Tensor, entropies: Tensor) -> None:
        """
        Let the control write its advantages and clip range where TRL's loss is about to read them.

        `compute_loss` hands TRL's loss a copy of its inputs; the loss calls `_get_per_token_logps_and_entropies`,
        which calls this; this changes the copy, and only then the loss reads its advantages.
        """
        mask = trained_mask(live)
        if self._measures_drift:
            self._correct(live, logps.detach(), mask)
        flow = live.get("token_flow")
        if flow is None:
            flow = self._flow(live, mask, logps.detach(), entropies.detach())
        old_logps = live.get("old_per_token_logps")
        self._tokens = tokens = Tokens(
            logps=logps,
            entropies=entropies,
            advantages=live["advantages"].unsqueeze(1),
            mask=mask,
            old_logps=logps.detach() if old_logps is None else old_logps,
            flow=flow,
            solved=None if live.get("solved") is None else live["solved"].unsqueeze(1),
        )
        totals = FlowTotals.of(flow, mask, entropies.detach(), live["advantages"])
        self._window_totals = totals if self._window_totals is None else self._window_totals + totals
        if _counts(live):
            self.recording.sample(live, tokens)
        if self._loss_trains:
            self._observe_live(totals)
        live["advantages"] = self.entropy_control.advantages(tokens)
        if not (isinstance(live["advantages"], Tensor) and live["advantages"].dim() == 2):
            raise TypeError(
                f"`advantages()` of `control={self.args.control!r}` returned {live['advantages']!r}; return a tensor, "
                "(B, 1) or (B, T)."
            )
        clip_range = self.entropy_control.clip_range(tokens)
        if clip_range is not None:
            self.epsilon_low, self.epsilon_high = clip_range

    def _correct(self, live: dict[str, Any], logps: Tensor, mask: Tensor) -> None:
        """TRL's correction for what vLLM sampled, and its metrics, from the forward that trains."""
        sampling_logps = live.get("sampling_per_token_logps")
        if sampling_logps is None and self._corrects_live:
            raise ValueError(
                "The rollout has no log-probabilities to correct with. Let `rollout_func` return `logprobs`, or set "
                "`vllm_importance_sampling_correction=False`."
            )
        if sampling_logps is None:
            return
        ratio = importance_ratio(
            logps,
            sampling_logps,
            mask,
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )
        if self._corrects_live:
            live["importance_sampling_ratio"] = ratio
        if _counts(live):
            drift = Drift.of(
                logps, sampling_logps, mask, ratio, self.vllm_importance_sampling_mode.startswith("sequence")
            )
            self._drift = drift if self._drift is None else self._drift + drift

    def _observe_live(self, totals: FlowTotals) -> None:
        """Where the totals of a live micro-batch are what the scope asks for, the control sees them."""
        if self._measuring == "live":
            self._batch_totals = (self._window_totals or totals).reduce(self._ranks)
            self._observe(self._batch_totals)
        elif self.args.flow_scope == "micro":
            # Lambda follows the micro-batch; the entropy that a target looks at stays that of the last whole step.
            unknown = torch.full_like(totals.entropy, torch.nan)
            self._observe(totals.with_entropy(unknown if self._last_totals is None else self._last_totals.entropy))

    def _open_window(self) -> None:
        if self.args.flow_scope == "micro" or self._measuring == "live":
            return
        totals = self._last_totals
        if self.args.flow_scope == "batch" and self._batch_totals is not None:
            totals = self._batch_totals
        if totals is not None:
            self._observe(totals)

    def _observe(self, totals: FlowTotals) -> None:
        self.entropy_control.observe(totals, self.state.global_step, self.state.max_steps)

    def _record(self, live: dict[str, Any], tokens: Tokens, loss: Tensor) -> None:
        tensors = {
            "log-probabilities": tokens.logps,
            "entropies": tokens.entropies,
            "advantages": live["advantages"],
            "reference log-probabilities": live.get("ref_per_token_logps"),
            "old log-probabilities": live.get("old_per_token_logps"),
            "importance-sampling ratios": live.get("importance_sampling_ratio"),
        }
        known = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        inputs = {name: live[name] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        self.guard.window.append(MicroBatch(inputs, known, tokens.mask, loss.detach()))
        self._window_lambdas.append(self.entropy_control.metrics().get("flow/lambda", 0.0))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._close_window()
        if self.args.nonfinite == "skip":
            loss = torch.where(loss.isfinite(), loss, torch.zeros_like(loss))  # or it would taint every later log
        return loss

    def _close_window(self) -> None:
        """Log the step, by the totals of its batch where they are known, else by the window's over all ranks."""
        assert self._window_totals is not None
        if self._batch_totals is not None and self.args.updates_per_rollout == 1:
            totals = self._batch_totals
        else:
            totals = self._window_totals.reduce(self.accelerator)
        self._means.give(self._metrics["train"], self.accelerator)
        self._log_step(totals)
        self._last_totals = totals
        self._window_totals, self._window_lambdas = None, []
        if self._drift is not None:
            for name, value in self._drift.metrics(self.accelerator).items():
                self._metrics["train"][name].append(value)
            self._drift = None
            self._look_at_drift()

    def _log_step(self, totals: FlowTotals) -> None:
        metrics: dict[str, Tensor | float] = {
            **totals.metrics(),
            "flow/lambda": sum(self._window_lambdas) / len(self._window_lambdas),
        }
        if self._last_totals is not None:
            metrics["entropy/delta"] = totals.entropy - self._last_totals.entropy
        for name, value in self.entropy_control.metrics().items():
            metrics.setdefault(name if "/" in name else f"control/{name}", value)
        numbers = [torch.as_tensor(number, device=totals.sums.device) for number in metrics.values()]
        # The one transfer to the host
        entropy, *values = torch.stack([number.float() for number in (totals.entropy, *numbers)]).tolist()
        for name, value in zip(metrics, values, strict=True):
            self._metrics["train"][name].append(value)
        warning = self.collapse_guard.look(entropy, self.state.global_step + 1)
        if warning is not None:
            logger.warning(warning)

    # ---- guards

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, *args)  # of all ranks
        models = torch.tensor(
            [isinstance(function, nn.Module) for function in self.reward_funcs], device=rewards.device
        )
        bad = rewards.isinf() | (rewards.isnan() & models)  # a reward model has no None that NaN could stand for
        any_bad = bool(bad.any())
        if self.model.training:
            self._rollout_is_bad = any_bad
        if any_bad:
            self._report_rewards(bad, completions)
            rewards = rewards.masked_fill(bad, torch.nan)
        judges = [column for column, function in enumerate(self.reward_funcs) if getattr(function, "judges", False)]
        if judges:  # without their verdict the other rewards of a completion would make it a wrong one
            rewards = rewards.masked_fill(rewards[:, judges].isnan().any(1, keepdim=True), torch.nan)
        self._count_answers(rewards, completions)
        return rewards

    def _count_answers(self, rewards: Tensor, completions: list) -> None:
        mode, generations = "eval", self.num_generations_eval
        if self.model.training:
            mode, generations = "train", self.num_generations
            begin = self.accelerator.process_index * len(completions)
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            total = total.masked_fill(rewards.isnan().all(1), torch.nan)
            self._rollout_rewards = total[begin : begin + len(completions)]
            of_group = (rewards[:, :1] > RIGHT).any(1).float().view(-1, generations).mean(1)
            self._rollout_solved = of_group.repeat_interleave(generations)[begin : begin + len(completions)]
        names = self.accelerator.gather(names_of(completions, rewards.device))
        right = (rewards[:, :1] > RIGHT).any(1)  # by the first function; there may be none
        distinct, solved = distinct_right(names, right, generations)
        self._metrics[mode]["answers/distinct"].append(distinct)
        self._metrics[mode]["answers/solved"].append(solved)

    def _report_rewards(self, bad: Tensor, completions: list) -> None:
        faults = []
        for row, column in bad.nonzero().tolist():
            rank, index = divmod(row, len(completions))
            name = self.reward_func_names[column] or type(self.reward_funcs[column]).__name__
            where = f"reward function {name!r} returned NaN or infinity for completion {index} of rank {rank}"
            faults.append(f"{where}: {completions[index]!r}" if rank == self.accelerator.process_index else where)
        more = [f"and {len(faults) - REWARDS_SHOWN} more"] if len(faults) > REWARDS_SHOWN else []
        what = "; ".join(faults[:REWARDS_SHOWN] + more)
        step = self.state.global_step
        if not self.model.training:
            logger.warning(f"Evaluation after step {step}: {what}. They count as no reward.", main_process_only=False)
        elif self.args.nonfinite == "stop":
            raise NonFiniteError(
                f"Step {step + 1}: {what}. No parameter was updated. Return None for a completion that cannot be "
                "judged, or set `nonfinite='skip'` to leave such steps out."
            )
        else:
            logger.warning(f"Step {step + 1}: {what}. The steps of this rollout are skipped.", main_process_only=False)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The Trainer's last call before `optimizer.step()`
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = torch.stack([micro_batch.loss for micro_batch in self.guard.window]).sum()
        # An overflow in fp16 is the gradient scaler's business: it skips the step and lowers its scale.
        judged_norm = None if self.accelerator.mixed_precision == "fp16" else grad_norm
        if not self._check_step(loss, judged_norm):
            model.zero_grad()
        self._metrics["train"]["guard/skipped_steps"] = [self.guard.skipped]  # a count, not to be averaged
        self.guard.window.clear()
        self._window_is_bad = False
        return grad_norm

    def _check_step(self, loss: Tensor, grad_norm: Any) -> bool:
        """Whether loss and gradient are finite on every rank; if not, stop or count, as the configuration says."""
        if hasattr(grad_norm, "full_tensor"):  # FSDP2
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=loss.device)
        ranks = self.accelerator.gather(torch.stack([loss.float(), norm.float()]).unsqueeze(0)).tolist()
        step = self.state.global_step + 1
        mean_loss = sum(rank_loss for rank_loss, _ in ranks) / len(ranks)
        rate = float(self._get_learning_rate())
        self.recording.facts = {"loss": mean_loss, "learning_rate": rate}
        if grad_norm is not None:
            self.recording.facts["grad_norm"] = ranks[0][1]
        problem = self.guard.inspect(ranks, self.accelerator.process_index, step)
        if problem is None and self._window_is_bad:
            problem = f"Step {step}: a reward was NaN or infinite."
        if problem is None:
            self.guard.passed(mean_loss)
            return True
        if self.args.updates_in_backward and grad_norm is not None:
            raise NonFiniteError(
                f"{problem} DeepSpeed and layer-wise optimizers have taken the update by now: go back to the last "
                "checkpoint."
            )
        self.guard.failed(problem)
        logger.warning(f"{problem} The step is skipped.", main_process_only=False)
        return False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] = self.guard.logged_loss(logs["loss"])
        if "train_loss" in logs:
            logs["train_loss"] = self.guard.final_loss(logs["train_loss"])
        super().log(logs, start_time)
        if self.model.training:
            self.recording.logged()

    # ---- state

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # before the rest, so that a push of the checkpoint takes it along
            state = self._control_state()
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / STATE_FILE, lambda part: part.write_text(state))
            self.recording.save(folder)
        super()._save_checkpoint(model, trial)

    def _control_state(self) -> str:
        state = {
            "control": self.args.control,
            "state": self.entropy_control.state_dict(),
            "totals": None if self._last_totals is None else self._last_totals.sums.tolist(),
            "guard": self.guard.state_dict(),
        }
        try:
            return json.dumps(state, indent=2)
        except TypeError as error:
            raise TypeError(
                f"`state_dict()` of `control={self.args.control!r}` must be JSON (numbers, strings, lists, maps), got "
                f"{state['state']!r}."
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._seed_vllm(self.state.global_step)  # the Trainer restores a saved state of the random numbers after this
        self.recording.restore(Path(checkpoint))
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            logger.warning(
                f"{path} does not exist: the entropy control starts afresh at step {self.state.global_step}."
            )
            return
        try:
            self._restore(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint, or delete "
                "the file to let the entropy control start afresh."
            ) from error

    def _restore(self, saved: dict[str, Any]) -> None:
        self.guard.load_state_dict(saved["guard"])
        if saved["totals"] is not None:
            self._last_totals = FlowTotals.load(saved["totals"], self.accelerator.device)
        if saved["control"] == self.args.control:
            self.entropy_control.load_state_dict(saved["state"])
        else:
            logger.warning(
                f"The checkpoint was written with `control={saved['control']!r}`; `control={self.args.control!r}` "
                "starts afresh."
            )


def _counts(live: dict[str, Any]) -> bool:
    """Whether a micro-batch has rows, and is not only there to keep step with other ranks."""
    return PLACE not in live or live[PLACE].rows > 0


# Editors and `help` show TRL's parameters
OPEFOTrainer.__init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # type: ignore[attr-defined]
