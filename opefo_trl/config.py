"""`OPEFOConfig`: TRL's `GRPOConfig` and the fields of entropy-flow control, refused where they cannot be right."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from opefo_trl.controls import Control, control_options, make_control
from opefo_trl.flow import ESTIMATORS, VOCABULARY_ESTIMATORS
from opefo_trl.repositories import check_repo_id
from opefo_trl.validation import check_bool, check_choice

SCOPES = ("batch", "running", "micro")
MICRO_BATCHING = ("exact", "trl")
NONFINITE = ("stop", "skip")
# Fields that a control may declare as options; the rest of its options come from `control_kwargs`.
CONTROL_FIELDS = ("flow_lambda_max", "flow_target", "flow_schedule", "flow_shape")
# And those of TRL's that it may want to know.
RUN_FIELDS = ("num_train_epochs", "max_steps", "epsilon", "epsilon_high")


class Secret(str):
    """A token that stays out of `training_args.bin`, which lies beside the model and goes to the Hub."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __repr__(self) -> str:
        return "'***'"


@dataclass
class OPEFOConfig(GRPOConfig):
    r"""
    Configuration class for the [`OPEFOTrainer`].

    This class includes only the parameters that are specific to entropy-flow control. For the others please refer to
    [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`]; their defaults are unchanged.

    Parameters:
        > Parameters that control the entropy

        control (`str`, *optional*, defaults to `"opefo"`):
            Entropy control: any name in `opefo_trl.controls.CONTROLS`. `"none"` is plain GRPO, with the flows measured
            and logged.
        control_kwargs (`dict[str, Any]` or `str`, *optional*):
            The control's own options, as a YAML map or as JSON on the command line. For `"opefo"`: `sides` (`"both"`,
            `"increase"` or `"decrease"`) and `static_lambda` (a fixed lambda instead of the balancing one).
        flow_estimator (`str`, *optional*, defaults to `"sampled"`):
            How a token's entropy change is estimated: `"sampled"` (the paper), `"exact"` (the first-order truth of a
            softmax step), `"steer"`, `"own_logit"`, `"covariance"`, or `"expected"` (an ablation). `"exact"` and
            `"expected"` sum over the vocabulary, in a scoring pass in every `flow_scope`.
        flow_scope (`str`, *optional*, defaults to `"batch"`):
            Whose flows fix lambda: `"batch"` (the paper) measures the whole generation batch over all ranks before it
            is trained on, in the scoring pass that vLLM's importance sampling runs anyway, and otherwise in one more
            forward, unless one micro-batch is the whole batch; `"running"` takes the totals of the previous optimizer
            step, for free, and with vLLM spares TRL's scoring pass; `"micro"` the live micro-batch of this rank, for
            ablation.
        flow_lambda_max (`float`, *optional*, defaults to `0.1`):
            Bound on the absolute value of lambda while no `flow_target` is set. The paper's lambda stays under 0.002
            and never meets it; on short completions lambda is far larger, and balancing costs reward. `1.0` is the
            paper's unbounded rule.
        flow_shape (`str`, *optional*):
            Shape of the correction. `"sign"` is the paper's 1 + lambda and 1 - lambda. `"minimal"` moves the predicted
            flow as far by weights that change the learning signal least. `None` is `"minimal"` with a constant
            `flow_target`, and else `"sign"`, each where it measured better.
        flow_target (`float` or `str`, *optional*):
            Entropy to hold. `None` balances always, as in the paper; a number is in nats; `"0.4x"` is a fraction of
            the first step's entropy. Lambda is then the share of the balancing one that the target needs, learned as
            the run goes, between 0 and 1.
        flow_schedule (`str`, *optional*, defaults to `"constant"`):
            How the target moves over the run: `"constant"`; from the first step's entropy to the target, `"linear"` or
            `"cosine"`; around the target by up to half of it, `"increase_decrease"`, `"decrease_increase_decrease"` or
            `"oscillating"`.

        > Parameters that make a run fast

        micro_batching (`str`, *optional*, defaults to `"exact"`):
            How a rollout is divided into micro-batches. `"exact"` gives the gradient of TRL's from fewer tokens:
            padding is trimmed, rows of like length share a micro-batch, and rows without a signal are left out, each
            where the loss allows it. `"trl"` is TRL's grouping.

        > Parameters that keep a run right

        strict_on_policy (`bool`, *optional*, defaults to `True`):
            Whether to insist on one optimizer step per generation batch: `num_iterations=1` and
            `steps_per_generation` equal to `gradient_accumulation_steps`.
        nonfinite (`str`, *optional*, defaults to `"stop"`):
            What a NaN or infinite loss, gradient or reward does: `"stop"` before the update, with a dump of the rows,
            or `"skip"` the step and count it (ten in a row stop the run). In fp16, gradients are left to the gradient
            scaler, which skips by itself.
        sampling_drift_max (`float`, *optional*, defaults to `0.1`):
            Mean difference, in nats, between the log-probabilities that vLLM sampled with and the policy's, above
            which vLLM is suspected of serving stale weights: a warning, and after five rollouts in a row a stop.
            `None` looks away.
        entropy_curves (`bool`, *optional*, defaults to `True`):
            Whether to record the entropy flow of every optimizer step in `output_dir`, and to draw it
            (`entropy_curves.png`, `report.html`) at every save and at the end.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "control_kwargs"]

    if TYPE_CHECKING:
        hub_token: str | None  # the Trainer's

    control: str = field(
        default="opefo",
        metadata={
            "help": "Entropy control: any name in `opefo_trl.controls.CONTROLS`. 'none' is plain GRPO, with the flows "
            "measured and logged."
        },
    )
    control_kwargs: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={
            "help": "The control's own options, as a YAML map or as JSON on the command line. For 'opefo': `sides` "
            "('both', 'increase' or 'decrease') and `static_lambda` (a fixed lambda instead of the balancing one)."
        },
    )
    flow_estimator: str = field(
        default="sampled",
        metadata={
            "help": "How a token's entropy change is estimated: 'sampled' (the paper), 'exact' (the first-order truth "
            "of a softmax step), 'steer', 'own_logit', 'covariance', or 'expected' (an ablation). 'exact' and "
            "'expected' sum over the vocabulary, in a scoring pass in every `flow_scope`.",
        },
    )
    flow_scope: str = field(
        default="batch",
        metadata={
            "help": "Whose flows fix lambda: 'batch' (the paper) measures the whole generation batch over all ranks "
            "before it is trained on, in the scoring pass that vLLM's importance sampling runs anyway, and otherwise "
            "in one more forward, unless one micro-batch is the whole batch; 'running' takes the totals of the "
            "previous optimizer step, for free, and with vLLM spares TRL's scoring pass; 'micro' the live micro-batch "
            "of this rank, for ablation.",
        },
    )
    flow_lambda_max: float = field(
        default=0.1,
        metadata={
            "help": "Bound on the absolute value of lambda while no `flow_target` is set. The paper's lambda stays "
            "under 0.002 and never meets it; on short completions lambda is far larger, and balancing costs reward. "
            "1.0 is the paper's unbounded rule."
        },
    )
    flow_shape: str | None = field(
        default=None,
        metadata={
            "help": "Shape of the correction. 'sign' is the paper's 1 + lambda and 1 - lambda. 'minimal' moves the "
            "predicted flow as far by weights that change the learning signal least. None is 'minimal' with a "
            "constant `flow_target`, and else 'sign', each where it measured better."
        },
    )
    flow_target: float | str | None = field(
        default=None,
        metadata={
            "help": "Entropy to hold. None balances always, as in the paper; a number is in nats; '0.4x' is a "
            "fraction of the first step's entropy. Lambda is then the share of the balancing one that the target "
            "needs, learned as the run goes, between 0 and 1."
        },
    )
    flow_schedule: str = field(
        default="constant",
        metadata={
            "help": "How the target moves over the run: 'constant'; from the first step's entropy to the target, "
            "'linear' or 'cosine'; around the target by up to half of it, 'increase_decrease', "
            "'decrease_increase_decrease' or 'oscillating'."
        },
    )
    micro_batching: str = field(
        default="exact",
        metadata={
            "help": "How a rollout is divided into micro-batches. 'exact' gives the gradient of TRL's from fewer "
            "tokens: padding is trimmed, rows of like length share a micro-batch, and rows without a signal are left "
            "out, each where the loss allows it. 'trl' is TRL's grouping."
        },
    )
    strict_on_policy: bool = field(
        default=True,
        metadata={
            "help": "Whether to insist on one optimizer step per generation batch: `num_iterations=1` and "
            "`steps_per_generation` equal to `gradient_accumulation_steps`."
        },
    )
    nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What a NaN or infinite loss, gradient or reward does: 'stop' before the update, with a dump of "
            "the rows, or 'skip' the step and count it (ten in a row stop the run). In fp16, gradients are left to "
            "the gradient scaler, which skips by itself."
        },
    )
    sampling_drift_max: float | None = field(
        default=0.1,
        metadata={
            "help": "Mean difference, in nats, between the log-probabilities that vLLM sampled with and the policy's, "
            "above which vLLM is suspected of serving stale weights: a warning, and after five rollouts in a row a "
            "stop. None looks away."
        },
    )
    entropy_curves: bool = field(
        default=True,
        metadata={
            "help": "Whether to record the entropy flow of every optimizer step in `output_dir`, and to draw it "
            "(`entropy_curves.png`, `report.html`) at every save and at the end."
        },
    )

    def __post_init__(self) -> None:
        self.control_kwargs = _as_options(self.control_kwargs)
        if isinstance(self.flow_target, str) and self.flow_target.lower() in ("none", "null"):
            self.flow_target = None  # a command line has no other way to take back what a config file sets
        self.sampling_drift_max = _as_drift(self.sampling_drift_max)
        self._apply_presets(self.make_control())
        super().__post_init__()
        for name in ("strict_on_policy", "entropy_curves"):
            check_bool(name, getattr(self, name))
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"`gradient_accumulation_steps={self.gradient_accumulation_steps}` must be 1 or more: it is the "
                "number of micro-batches in an optimizer step."
            )
        self._check_hub()
        check_choice("flow_estimator", self.flow_estimator, ESTIMATORS)
        check_choice("flow_scope", self.flow_scope, SCOPES)
        check_choice("nonfinite", self.nonfinite, NONFINITE)
        check_choice("micro_batching", self.micro_batching, MICRO_BATCHING)
        control = self.make_control()
        self._check_on_policy(control)
        self._check_loss(control)
        self._check_guards()
        if control.shapes_tokens:
            self._warn_of_rivals()
        self._warn_of_idle_fields(control)
        self._warn_of_checkpoints_inside_a_window()

    def _check_hub(self) -> None:
        if self.hub_token is not None:
            self.hub_token = Secret(self.hub_token)
        if self.hub_model_id is None and not self.push_to_hub:
            return
        check_repo_id(
            self.hub_model_id or Path(self.output_dir).absolute().name,
            f"`hub_model_id={self.hub_model_id!r}` with `output_dir={self.output_dir!r}`",
        )

    def make_control(self) -> Control:
        """A fresh control with the options of this configuration."""
        options = control_options(self.control)
        assert isinstance(self.control_kwargs, dict)  # since `__post_init__`
        known = (*CONTROL_FIELDS, *RUN_FIELDS)
        for name in self.control_kwargs:
            if name in known and name in options:
                raise ValueError(
                    f"`control_kwargs` sets {name!r}, which has a field of its own: set `{name}` instead."
                )
        fields = {name: getattr(self, name) for name in known if name in options}
        return make_control(self.control, **fields, **self.control_kwargs)

    def _apply_presets(self, control: Control) -> None:
        """A control that is TRL's own sets TRL's fields, and does not overrule what somebody has set otherwise."""
        for name, value in control.presets.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, value):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` and `control={self.control!r}`, which sets it to {value!r}: "
                    "drop the field and use `control_kwargs`, or keep it and use `control='none'`."
                )
            setattr(self, name, value)

    def estimator_of(self, control: Control) -> str:
        """The flow estimator that a control insists on, or else the one of this configuration."""
        return control.estimator or self.flow_estimator

    @property
    def active_fields(self) -> list[str]:
        """The fields of `CONTROL_FIELDS` that this control reads."""
        idle = self.make_control().idle_fields
        return [name for name in CONTROL_FIELDS if name in control_options(self.control) and name not in idle]

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps taken on one generation batch; 1 is strictly on-policy."""
        return self._micro_batches_per_rollout / self.gradient_accumulation_steps

    @property
    def _micro_batches_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    def measuring(self, control: Control) -> str:
        """
        When the flow of a generation batch is measured: `"ahead"` of its training by a scoring pass, `"live"` by the
        forward that trains it, where one micro-batch is the whole batch of its rank, or `"never"` as a whole.
        """
        estimator = self.estimator_of(control)
        if estimator in VOCABULARY_ESTIMATORS:
            return "ahead"
        if self.flow_scope != "batch" or not (control.needs_totals or estimator == "covariance"):
            return "never"
        one_micro_batch = self.updates_per_rollout == 1 and self.gradient_accumulation_steps == 1
        return "live" if one_micro_batch and not self.corrects_vllm else "ahead"

    @property
    def corrects_vllm(self) -> bool:
        """Whether TRL scores every rollout, to weigh it with the ratio of the policy to what vLLM sampled from."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def corrects_live(self, control: Control) -> bool:
        """Whether the forward that trains a rollout gives that ratio, so that TRL need not score the rollout."""
        scored = self.flow_scope == "batch" or self.measuring(control) == "ahead"
        return self.corrects_vllm and self.updates_per_rollout == 1 and not scored

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters change inside the backward pass, before a gradient can be looked at."""
        return self.deepspeed_plugin is not None or any(word in self.optim for word in ("lomo", "layerwise"))

    def _check_on_policy(self, control: Control) -> None:
        if not self.strict_on_policy:
            if self.flow_scope == "batch" and control.needs_totals and not self.updates_per_rollout.is_integer():
                raise ValueError(
                    f"`steps_per_generation={self.steps_per_generation}` with `gradient_accumulation_steps="
                    f"{self.gradient_accumulation_steps}` lets an optimizer step span several rollouts, and "
                    "`flow_scope='batch'` would fix its lambda by the first of them. Use `flow_scope='running'`, or "
                    "make `steps_per_generation` a multiple of `gradient_accumulation_steps`."
                )
            return
        if not control.acts_on_policy:
            self._warn(
                f"`control={self.control!r}` does nothing strictly on-policy, where the ratio of every token is 1. It "
                f"acts with `strict_on_policy=False` and several updates to a rollout, such as `steps_per_generation="
                f"{4 * self.gradient_accumulation_steps}` (4 updates)."
            )
        way_out = "or pass `strict_on_policy=False`."
        if self.num_iterations != 1:
            raise ValueError(
                f"`num_iterations={self.num_iterations}` trains {self.num_iterations} times on one rollout; OPEFO is "
                f"strictly on-policy. Set `num_iterations=1`, {way_out}"
            )
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError(
                f"`steps_per_generation={self.steps_per_generation}` with `gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}` takes {self.updates_per_rollout:g} optimizer steps per rollout; "
                f"OPEFO is strictly on-policy and takes 1. Set them equal, {way_out}"
            )

    def _check_loss(self, control: Control) -> None:
        if control.shapes_tokens and self.importance_sampling_level == "sequence":
            raise ValueError(
                "`importance_sampling_level='sequence'` gives every token of a completion the same gradient, so the "
                f"token weights of `control={self.control!r}` would be averaged away. Use "
                "`importance_sampling_level='token'`, or `control='none'`."
            )
        if control.shapes_tokens and self.loss_type == "luspo":
            self._warn(
                "`loss_type='luspo'` is a sequence-level objective. With `importance_sampling_level='token'`, which "
                f"token weights such as those of `control={self.control!r}` need, it is a plain sum over tokens and "
                "no longer LUSPO. `loss_type='dapo'` says the same with a better normaliser."
            )
        if control.clips and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"`control={self.control!r}` lives by the clip range, which `loss_type={self.loss_type!r}` has not, "
                "or means otherwise. Use `loss_type='dapo'`, 'dr_grpo', 'grpo' or 'bnpo'."
            )
        if control.clips and not control.presets and self.importance_sampling_level == "sequence":
            raise ValueError(
                f"`control={self.control!r}` bounds the ratio of each token, and `importance_sampling_level="
                "'sequence'` has one for a completion. Use `importance_sampling_level='token'`."
            )
        if control.estimator and self.loss_type in ("grpo", "sapo"):
            raise ValueError(
                f"`control={self.control!r}` compares the flow of single tokens, which `loss_type="
                f"{self.loss_type!r}` weighs by the length of their completion. Use `loss_type='dapo'`."
            )
        if (self.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
            raise ValueError(
                "`liger_kernel_config={'fused_linear_cross_entropy': True}` replaces the forward that "
                "log-probabilities and entropies come from. Drop that key; Liger's other kernels are fine."
            )

    def _check_guards(self) -> None:
        if self.nonfinite == "skip" and self.updates_in_backward:
            raise ValueError(
                "`nonfinite='skip'` cannot be kept under DeepSpeed or with a layer-wise optimizer, which update the "
                "parameters inside the backward pass. Use `nonfinite='stop'`, which checks the loss before it."
            )

    def _warn_of_rivals(self) -> None:
        """Settings of TRL that work against a control, or behind its back."""
        if self.entropy_coef != 0 or self.use_adaptive_entropy:
            name = "use_adaptive_entropy=True" if self.use_adaptive_entropy else f"entropy_coef={self.entropy_coef}"
            self._warn(
                f"`{name}` pushes entropy at the same time as `control={self.control!r}`: the flows do not see the "
                "bonus, and the two fight. Keep one of them."
            )
        if self.top_entropy_quantile < 1:
            self._warn(
                f"`top_entropy_quantile={self.top_entropy_quantile}` drops tokens from the loss after "
                f"`control={self.control!r}` has counted their flow, so lambda balances tokens that do not train."
            )
        if self.off_policy_mask_threshold is not None:
            self._warn(
                f"`off_policy_mask_threshold={self.off_policy_mask_threshold}` drops completions from the loss after "
                f"`control={self.control!r}` has counted their flow, so lambda balances tokens that do not train."
            )

    def _warn_of_idle_fields(self, control: Control) -> None:
        """Fields that were set and that nothing will read."""
        options = control_options(self.control)
        idle = {name: "it takes no such option" for name in CONTROL_FIELDS if name not in options}
        if not (control.needs_totals or self.corrects_vllm):
            idle["flow_scope"] = "it does not observe the flow"
        if control.estimator:
            idle["flow_estimator"] = f"it needs {control.estimator!r}"
        for name, reason in {**idle, **control.idle_fields}.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                self._warn(f"`control={self.control!r}` does not use `{name}={getattr(self, name)!r}`: {reason}.")

    def _warn_of_checkpoints_inside_a_window(self) -> None:
        window = self._micro_batches_per_rollout
        period = math.lcm(window, self.gradient_accumulation_steps) // self.gradient_accumulation_steps
        if period == 1 or self.save_strategy not in ("steps", "best"):
            return
        name = "save_steps" if self.save_strategy == "steps" else "eval_steps"
        every = getattr(self, name) or self.logging_steps  # the Trainer's own default of `eval_steps`
        if every < 1:  # a share of the run; below 0 when nobody knows how long it is
            every = math.ceil(every * self.max_steps)
        if every <= 0 or every % period:
            self._warn(
                f"`{name}={getattr(self, name)}` may place checkpoints inside a rollout of {period} optimizer steps. "
                "Resuming from one of them generates anew and does not continue bit for bit. Use a multiple of "
                f"{period}."
            )

    def _warn(self, message: str) -> None:
        if self.process_index == 0:
            warnings.warn(message, UserWarning, stacklevel=5)


def _as_options(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    options = value
    if isinstance(value, str):
        with contextlib.suppress(json.JSONDecodeError):
            options = json.loads(value)
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(
            f"`control_kwargs={value!r}` is not a map. Give a YAML map in a config file, a dict in Python, or JSON on "
            """the command line: --control_kwargs '{"sides": "increase"}'."""
        )
    return options


def _as_drift(value: Any) -> float | None:
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    try:
        if not isinstance(value, bool) and float(value) > 0:
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"`sampling_drift_max={value!r}` must be a number above 0, in nats, or None to let any drift pass."
    )
