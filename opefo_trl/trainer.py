"""`OPEFOTrainer`: TRL's `GRPOTrainer` with an entropy control between the log-probabilities and the loss.

TRL keeps generation, rewards, losses and everything around them. This file overrides its hooks, each in a few lines
that delegate to opefo_trl/training/; trl_compat.py lists the hooks, and a contract test holds each of them in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from trl import GRPOTrainer

from opefo_trl.config import OPEFOConfig
from opefo_trl.controls import Tokens
from opefo_trl.controls.opefo import PAPER
from opefo_trl.curves import EntropyCurves
from opefo_trl.files import CHECKPOINT_PREFIX, NONFINITE_FOLDER
from opefo_trl.hub.mixin import HubMixin
from opefo_trl.playground import resolve_model
from opefo_trl.training.answer_diversity import RolloutAnswers, normal_form_of
from opefo_trl.training.colocated_vllm import adapt_cpu_build, seed_sampling
from opefo_trl.training.control_state import load_control_state, save_control_state
from opefo_trl.training.dynamic_sampling import DynamicSampling
from opefo_trl.training.eligibility import BatchTransforms, positions_of
from opefo_trl.training.flow_step import FlowStep
from opefo_trl.training.generation_scores import GenerationScores
from opefo_trl.training.guards import CollapseGuard, DriftGuard, MicroBatchRecord, StepGuard
from opefo_trl.training.metric_means import MetricMeans
from opefo_trl.training.microbatches import trained_mask
from opefo_trl.training.rebatching import BOOKKEEPING, PUSHED, Rebatcher, SingleRankAccelerator, has_rows
from opefo_trl.training.recorder import SKIPPED_STEPS, Recorder, run_settings
from opefo_trl.training.reward_guard import RewardGuard, watch_rewards
from opefo_trl.training.sampler_drift import SamplerCorrection
from opefo_trl.training.scoring import ScoringPass, scoring_arguments
from opefo_trl.trl_compat import (
    SAMPLING_DRIFT,
    disable_gradient_checkpointing,
    get_config_model_id,
)

logger = get_logger(__name__)


class OPEFOTrainer(HubMixin, DynamicSampling, GRPOTrainer):
    """
    Trainer for GRPO with entropy-flow control: On-Policy Entropy Flow Optimization (OPEFO) and related methods.

    Takes the arguments of [`~trl.GRPOTrainer`], with an [`OPEFOConfig`] as `args`. The model `"playground"` is the
    tiny one that comes with this package.

    Attributes:
        curves ([`~opefo_trl.curves.EntropyCurves`]): the steps so far; `trainer.curves.plot()` draws them. None with
            `entropy_curves=False`, and on all ranks but the first.
        publisher ([`~opefo_trl.hub.Publisher`]): pushes to the Hub; `trainer.publisher.report()` lists every save and
            its outcome. None without `push_to_hub`, and on all ranks but the first.
        run_facts ([`~opefo_trl.hub.model_card.RunFacts`]): facts for the model card that only the script knows (data
            source, recipe file).

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
    _paper = PAPER

    args: OPEFOConfig
    reward_funcs: list[Any]
    accelerator: Any
    epsilon_low: Any
    epsilon_high: Any

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: OPEFOConfig | None = None, *positional: Any, **keywords: Any
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
            adapt_cpu_build("bfloat16" if args.bf16 else "float32")
        if args.control != "opefo":  # the model card names the method that was used
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper
            self._tag_names = [*GRPOTrainer._tag_names, *([args.control] if args.control != "none" else [])]
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        self._loss_inputs: dict[str, Any] | None = None  # inputs of the loss under way
        self._loss_trains = False  # whether that loss is computed for its gradient, or only for its metrics
        self._loss_tokens: Tokens | None = None

        self.reward_funcs = watch_rewards(self.reward_funcs, self.reward_func_names)
        self.recorder = Recorder(
            Path(args.output_dir),
            run_settings(args, get_config_model_id(self.model.config)),
            lambda: self._metrics["train"],
            self._tokenizer,
            active=args.entropy_curves and self.is_world_process_zero(),
        )
        self.add_callback(self.recorder)
        self._begin_run()
        seed_sampling(args, self.accelerator, 0)

    def _begin_run(self) -> None:
        """Reset all state of a run; called again by each `train()`."""
        args = self.args
        self.entropy_control = control = args.make_control()
        self.flow_step = FlowStep(args, control, self.accelerator)
        self.scoring = ScoringPass(self.flow_step.estimator, self.temperature, args.cast_lm_head_to_fp32)
        bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        self._correction = SamplerCorrection.for_run(args, control, self.vllm_importance_sampling_mode, *bounds)
        self._corrects_live = self._correction is not None and self._correction.corrects
        positions = positions_of(self.model.config)
        transforms = BatchTransforms.for_run(args, control, positions, self.aux_loss_enabled)
        needed = transforms.drop or self.flow_step.measuring == "ahead"
        self.generation_scores = GenerationScores.for_run(
            args, self.flow_step.estimator, self.model, positions, self.rollout_func, needed
        )
        step = args.loss_type, args.gradient_accumulation_steps
        self.rebatcher = Rebatcher(transforms, self.accelerator, *step, self.pad_to_multiple_of)
        self._means = MetricMeans.for_run(args, control)
        self.drift_guard, self.collapse_guard = DriftGuard.of(args), CollapseGuard()
        self.guard = StepGuard(
            args.nonfinite, Path(args.output_dir) / NONFINITE_FOLDER, self._tokenizer.decode, args.updates_in_backward
        )
        self.reward_guard = RewardGuard.watch(args.nonfinite, self.reward_funcs, self.reward_func_names)
        self._answers: RolloutAnswers | None = None  # of the rollout under way
        self._begin_sampling()
        self._step, self._buffered_inputs = 0, None  # TRL's: an interrupted run leaves them inside a rollout
        self._metrics["train"].clear()
        self.recorder.begin()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_run()
        if self.args.micro_batching == "exact":
            self.rebatcher.log_transforms()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.recorder.end()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the Trainer would take one more step
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    @property
    def curves(self) -> EntropyCurves | None:
        return self.recorder.curves

    # ---- the generation batch: measure its flow before anything is trained on it

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self.scoring.keep_scores():
            with self._trl_correction_off() if self._corrects_live else nullcontext():
                batch = super()._generate_and_score_completions(inputs)
            self._clear_rounding(batch)
            # The rewards are kept in the batch, since TRL shuffles its rows and the curves show some of them
            right = None
            if self._answers is not None:  # a subclass may compute the rewards by itself
                batch["reward"], batch["solved"] = self._answers.rewards, self._answers.solved_share
                right = self._answers.right_or_better(batch["advantages"])
            self.flow_step.mark_pushed(batch, right)
            if self.args.zero_advantage_tokens == "leave_out":
                batch["num_items_in_batch"] = self._counted_tokens(batch)
            if self.args.corrects_vllm and not self._corrects_live:
                self._check_drift(self._metrics["train"][f"{SAMPLING_DRIFT}/mean"][-1])
            scores = self.scoring.scores_of(batch.get("old_per_token_logps"))
            scores = scores or self.generation_scores.take(batch, trained_mask(batch), self.accelerator)
            if scores is None and self.flow_step.measuring == "ahead":
                self._warn(self.generation_scores.explain())
                scores = self.scoring.scores_of(self._score(batch))
        if scores is not None:
            if not self.args.spans_updates:  # valid until the update
                batch["logps"], batch["entropies"] = scores.logps, scores.entropies
            if self.flow_step.measuring == "ahead":
                self.flow_step.measure_rollout(batch, trained_mask(batch), scores)
        return batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        generate = partial(super()._generate_single_turn, **kwargs)
        return self.generation_scores.collect(generate, self.accelerator.unwrap_model(self.model), *args)

    @contextmanager
    def _trl_correction_off(self) -> Iterator[None]:
        """Keep TRL from scoring the rollout for vLLM's ratio: `SamplerCorrection.apply` computes the ratio during the
        training forward instead."""
        self.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = True

    def _score(self, batch: dict[str, Any]) -> Tensor:
        """Return log-probabilities of the generation batch, as TRL's own scoring pass computes them, (B, T)."""
        rows, multimodal = scoring_arguments(batch)
        size = self.args.per_device_train_batch_size
        with torch.no_grad(), self._no_checkpointing():
            return self._get_per_token_logps_and_entropies(self.model, *rows, batch_size=size, **multimodal)[0]

    def _no_checkpointing(self) -> Any:
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        previous = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is previous or not self.rebatcher.transforms.trim:
            return inputs
        self._buffered_inputs = self.rebatcher.divide(self._buffered_inputs, self._means, self._is_vlm)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # ---- the hidden path through TRL's loss
    #
    #   compute_loss -> GRPOTrainer.compute_loss -> GRPOTrainer._compute_loss(model, live)
    #       -> _get_per_token_logps_and_entropies -> _apply_control(live)   writes live["advantages"], epsilon_low/high
    #       <- TRL's loss reads live["advantages"] and self.epsilon_low/high only now
    #
    # `GRPOTrainer._compute_loss` asks for log-probabilities before it reads the advantages, and takes them as (B, T).
    # In between, `_apply_control` writes the control's advantages into a copy of the inputs, and every loss type,
    # importance ratio, KL term, mask and metric stays TRL's own.

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.guard.window:  # the first micro-batch of an optimizer step
            self.flow_step.begin(self.state, self._get_learning_rate(), self.optimizer, self.guard.in_a_row > 0)
        bookkeeping = inputs.get(BOOKKEEPING)
        for dropped in bookkeeping.dropped if bookkeeping else []:  # only for their metrics and totals
            forward = nullcontext() if "entropies" in dropped else self._no_checkpointing()
            with torch.no_grad(), forward, self._loss_of(dropped) as rows:
                super().compute_loss(self.model, rows, return_outputs, num_items_in_batch)
        with self._loss_of(inputs, trains=True) as live:
            loss = super().compute_loss(model, live, return_outputs, num_items_in_batch)
            assert self._loss_tokens is not None, "TRL's loss no longer asks for log-probabilities"
            if bookkeeping and bookkeeping.loss_weight != 1:
                loss = loss * bookkeeping.loss_weight
            penalty = self.flow_step.penalty(
                self._loss_tokens, live["num_items_in_batch"], self.current_gradient_accumulation_steps
            )
            if penalty is not None:
                loss = loss + penalty
            self.guard.window.append(MicroBatchRecord.of(live, self._loss_tokens, loss))
            self.flow_step.record_lambda()
            self.reward_guard.step_is_bad |= self.reward_guard.rollout_is_bad
        if self.args.updates_in_backward:
            self._check_step(loss.detach(), None)
        return loss

    @contextmanager
    def _loss_of(self, inputs: dict[str, Any], trains: bool = False) -> Iterator[dict[str, Any]]:
        """Yield a copy of a micro-batch for TRL's loss, which `_apply_control` may change; then move the metrics TRL
        logged into our weighted means, if row counts may differ."""
        original = self.epsilon_low, self.epsilon_high, self.accelerator
        self._loss_inputs, self._loss_trains = {**inputs}, trains
        if self.rebatcher.uneven:  # `GRPOTrainer._compute_loss` gathers a number for each row, from all ranks
            self.accelerator = SingleRankAccelerator(self.accelerator)
        try:
            yield self._loss_inputs
        finally:
            self._loss_inputs = self._loss_tokens = None
            self.epsilon_low, self.epsilon_high, self.accelerator = original
        if self.rebatcher.uneven:
            self._means.take(self._metrics["train"], inputs[BOOKKEEPING].rows, inputs[BOOKKEEPING].tokens)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        forward = super()._get_per_token_logps_and_entropies
        if batch_size is not None:  # TRL gives it in a scoring pass, and only there

            def score(ids: Tensor, mask: Tensor, keep: int, **more: Any) -> Any:
                return forward(model, ids, mask, keep, **more)

            rows = input_ids, attention_mask, logits_to_keep, batch_size
            policy = self.accelerator.unwrap_model(model) if model is self.model else None
            return self.scoring.run(score, self.rebatcher, *rows, policy=policy, **kwargs)
        live = self._loss_inputs
        if live is not None and not self._loss_trains and "entropies" in live:  # dropped rows that are scored already
            logps, entropies, aux_loss = live["logps"], live["entropies"], None
        else:
            logps, entropies, aux_loss = forward(model, input_ids, attention_mask, logits_to_keep, **kwargs)
        if live is not None:
            self._apply_control(live, logps, entropies)
        return logps, entropies, aux_loss

    def _apply_control(self, live: dict[str, Any], logps: Tensor, entropies: Tensor) -> None:
        """Measure the micro-batch's flow, then write the control's advantages and clip range before TRL reads them."""
        mask = trained_mask(live)
        drift = None if self._correction is None else self._correction.apply(live, logps.detach(), mask)
        if drift is not None and has_rows(live):
            self.flow_step.add_drift(drift)
        if self._loss_trains:
            self.generation_scores.compare(live, logps.detach(), mask)
        totals = self.flow_step.measure(live, mask, logps.detach(), entropies.detach())
        old_logps = live.get("old_per_token_logps")
        self._loss_tokens = tokens = Tokens(
            logps=logps,
            entropies=entropies,
            advantages=live["advantages"].unsqueeze(1),
            mask=mask,
            old_logps=logps.detach() if old_logps is None else old_logps,
            flow=live["token_flow"],
            solved=None if live.get("solved") is None else live["solved"].unsqueeze(1),
            pushed=None if live.get(PUSHED) is None else live[PUSHED].unsqueeze(1),
        )
        if has_rows(live):
            self.recorder.sample(live, tokens, self.state)
        self.flow_step.add(totals, self._loss_trains, self.state)
        live["advantages"] = self.flow_step.advantages(tokens)
        clip_range = self.entropy_control.clip_range(tokens)
        if clip_range is not None:
            self.epsilon_low, self.epsilon_high = clip_range

    # ---- the end of an optimizer step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the last micro-batch of an optimizer step
            self._log_step()
        if self.args.nonfinite == "skip":
            loss = torch.where(loss.isfinite(), loss, torch.zeros_like(loss))  # or it would taint every later log
        return loss

    def _log_step(self) -> None:
        has_drift = self.flow_step.drift is not None
        self._warn(self.generation_scores.judge(self.accelerator))
        self._means.log_to(self._metrics["train"], self.accelerator)
        metrics, entropy = self.flow_step.end()
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        self._warn(self.collapse_guard.check(entropy, self.state.global_step + 1))
        if has_drift:
            self._check_drift(metrics[f"{SAMPLING_DRIFT}/mean"])

    def _check_drift(self, drift: float) -> None:
        self._warn(self.drift_guard.check(drift, self.state.global_step + 1))

    def _warn(self, message: str | None, every_rank: bool = False) -> None:
        if message is not None:
            logger.warning(message, main_process_only=not every_rank)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called by `Trainer._run_epoch` after clipping, before `optimizer.step()`
        grad_norm = super()._get_grad_norm(model, grad_norm)
        loss = torch.stack([record.loss for record in self.guard.window]).sum()
        # An overflow in fp16 is the gradient scaler's business: it skips the step and lowers its scale.
        judged_norm = None if self.accelerator.mixed_precision == "fp16" else grad_norm
        if not self._check_step(loss, judged_norm):
            model.zero_grad()
        self._metrics["train"][SKIPPED_STEPS] = [self.guard.skipped]  # a count, not to be averaged
        self.guard.window.clear()
        self.reward_guard.step_is_bad = False
        return grad_norm

    def _check_step(self, loss: Tensor, grad_norm: Any) -> bool:
        """Raise on a non-finite step, or return False if it counts as skipped (the caller zeroes the gradient)."""
        step = self.state.global_step + 1
        numbers = self.guard.check(loss, grad_norm, self.accelerator, step, self.reward_guard.step_is_bad)
        self.recorder.step_numbers = {"loss": numbers.loss, "learning_rate": float(self._get_learning_rate())}
        if numbers.grad_norm is not None:
            self.recorder.step_numbers["grad_norm"] = numbers.grad_norm
        self._warn(numbers.problem and f"{numbers.problem} The step is skipped.", every_rank=True)
        return numbers.problem is None

    # ---- rewards, logs, checkpoints

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, *args)  # of all ranks
        training, rank = self.model.training, self.accelerator.process_index
        rewards, warning = self.reward_guard.check(rewards, completions, rank, self.state.global_step, training)
        self._warn(warning, every_rank=True)
        generations = self.num_generations if training else self.num_generations_eval
        form = normal_form_of(self.reward_funcs)
        answers = RolloutAnswers.count(rewards, self.reward_weights, completions, generations, self.accelerator, form)
        metrics = self._metrics["train" if training else "eval"]
        metrics["answers/distinct"].append(answers.distinct)
        metrics["answers/solved"].append(answers.solved)
        if training:
            self._answers, self._signal = answers, self._with_signal(rewards)
        return rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(self.guard.correct_losses(logs), start_time)
        if self.model.training:
            self.recorder.metrics_cleared()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:  # before the rest, so that a push of the checkpoint takes it along
            folder = Path(self._get_output_dir(trial=trial)) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
            state = self.entropy_control, self.flow_step.last, self.guard, self.prompt_order, self.generation_scores
            save_control_state(folder, self.args.control, *state)
            self.recorder.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The Trainer restores a saved state of the random numbers after this
        seed_sampling(self.args, self.accelerator, self.state.global_step)
        self._skip_orders(int(self.state.epoch))
        self.recorder.restore(Path(checkpoint), self.state.global_step)
        state = self.entropy_control, self.guard, self.accelerator.device, self.prompt_order, self.generation_scores
        self.flow_step.last, warning = load_control_state(Path(checkpoint), self.args.control, *state)
        self._warn(warning)


# Editors and `help` show TRL's parameters
OPEFOTrainer.__init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # type: ignore[attr-defined]
