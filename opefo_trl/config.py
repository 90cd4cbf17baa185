"""`OPEFOConfig`: TRL's `GRPOConfig` with the fields of entropy-flow control. config_checks.py says what is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from opefo_trl.config_checks import check_all, check_trl_values, parse_drift_bound
from opefo_trl.controls import Control, control_options, make_control
from opefo_trl.controls.options import CONTROL_FIELDS, RUN_FIELDS
from opefo_trl.flow import VOCABULARY_ESTIMATORS
from opefo_trl.repositories import check_repo_id
from opefo_trl.validation import check_map


class Secret(str):
    """A token that is never pickled: `training_args.bin` lies beside the model and goes to the Hub."""

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
            How a token's entropy change is estimated: `"sampled"` (the paper), `"exact"` (the first-order change of a
            softmax step), `"steer"`, `"own_logit"`, `"covariance"`, or `"expected"` (an ablation). `"exact"` and
            `"expected"` sum over the vocabulary before the rollout is trained on, in every `flow_scope`.
            `"covariance"` and `"expected"` go with `flow_shape="sign"` only.
        flow_scope (`str`, *optional*, defaults to `"batch"`):
            Totals that set lambda. `"batch"` (the paper): the generation batch over all ranks, measured before it is
            trained on: while transformers generates it, or by the scoring pass that TRL runs for vLLM.
            `"running"`: the previous optimizer step; with vLLM it avoids TRL's scoring pass.
            `"micro"`: the live micro-batch of this rank, for ablation.
        flow_lambda_max (`float`, *optional*, defaults to `0.1`):
            Bound on |lambda| while no `flow_target` is set. The paper's lambda stays under 0.002; on short completions
            it is far larger, and balancing costs reward. `1.0` is the paper's unbounded rule.
        flow_shape (`str`, *optional*):
            How the flow is changed. `"sign"`: tokens are weighted by the paper's 1 + lambda and 1 - lambda.
            `"additive"`: an entropy bonus on the rows of `flow_rows`, whose coefficient is solved for. `None`:
            `"additive"` with a `flow_target` (and `sides="both"`), else `"sign"`.
        flow_rows (`str`, *optional*, defaults to `"right"`):
            Completions on which `"additive"` acts: those that are `"right"` (the first reward function gives more than
            0.5 or, in a rollout without any such, the advantage is above 0; with a `flow_target` in the scope `batch`,
            of those without an advantage only as many as the push needs), those with an advantage above 0
            (`"advantaged"`, which leaves all zero-advantage rows to be dropped), or `"all"`.
        flow_target (`float` or `str`, *optional*):
            Entropy to hold. `None`: balance at every step, within `flow_lambda_max`; a number is in nats; `"0.4x"` is
            a fraction of the first step's entropy. Entropy falls freely until shortly before it, lands on it and is
            then held by lambda, between -0.5 and 2 (1 with `flow_shape="sign"`).
        flow_sides (`str`, *optional*, defaults to `"both"`):
            With a `flow_target`: whether entropy is brought back from `"both"` sides of the target, or the target is
            only a `"floor"`.
        flow_schedule (`str`, *optional*, defaults to `"constant"`):
            How the target moves over the run: `"constant"`; from the first step's entropy to the target, `"linear"` or
            `"cosine"`; around the target by up to half of it, `"increase_decrease"`, `"decrease_increase_decrease"` or
            `"oscillating"`; constant for the first half, then linearly down to half of it, `"hold_then_anneal"`.

        > Parameters that choose what is trained on

        resample_rounds (`int`, *optional*, defaults to `0`):
            Dynamic sampling: rounds of generation, by the same policy, in which groups whose rewards are all equal are
            replaced by groups of fresh prompts. What still has no signal after them is trained on as it is. `0`:
            no such round.
        resample_keep (`str`, *optional*, defaults to `"informative"`):
            Groups that are not replaced: those with different rewards (`"informative"`); these and those whose
            completions are all right (`"all_right"`) or all wrong (`"all_wrong"`), by the first reward function.
        zero_advantage_tokens (`str`, *optional*, defaults to `"count"`):
            Whether the tokens of groups whose rewards are all equal `"count"` in the number of tokens that the loss
            is divided by, as in TRL, or are left out of it (`"leave_out"`), with `loss_type` `"dapo"`, `"cispo"` or
            `"vespo"`.

        > Parameters that make a run fast

        micro_batching (`str`, *optional*, defaults to `"exact"`):
            How a rollout is divided into micro-batches. `"exact"` gives TRL's gradient from fewer tokens: padding is
            trimmed, rows are regrouped by length, and zero-advantage rows skip the backward, each where the loss
            allows it. `"trl"` keeps TRL's grouping.

        > Parameters that keep a run right

        strict_on_policy (`bool`, *optional*, defaults to `True`):
            Whether to insist on one optimizer step per generation batch: `num_iterations=1` and
            `steps_per_generation` equal to `gradient_accumulation_steps`.
        nonfinite (`str`, *optional*, defaults to `"stop"`):
            On a NaN or infinite loss, gradient or reward: `"stop"` before the update, with a dump of the rows, or
            `"skip"` the step and count it (ten in a row stop the run). In fp16 the gradient scaler handles gradients.
        sampling_drift_max (`float`, *optional*, defaults to `0.1`):
            Mean difference, in nats, between vLLM's log-probabilities and the policy's, above which vLLM's weights are
            suspected to be stale: a warning, and after five rollouts in a row an error. `None` disables the check.
        entropy_curves (`bool`, *optional*, defaults to `True`):
            Whether to record the entropy flow of every optimizer step in `output_dir`, and to draw it
            (`entropy_curves.png`, `report.html`) at every save and at the end.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "control_kwargs"]

    if TYPE_CHECKING:
        hub_token: str | None  # the Trainer's
        model_init_kwargs: Any

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
            "help": "How a token's entropy change is estimated: 'sampled' (the paper), 'exact' (the first-order "
            "change of a softmax step), 'steer', 'own_logit', 'covariance', or 'expected' (an ablation). 'exact' and "
            "'expected' sum over the vocabulary before the rollout is trained on, in every `flow_scope`. 'covariance' "
            "and 'expected' go with `flow_shape='sign'` only.",
        },
    )
    flow_scope: str = field(
        default="batch",
        metadata={
            "help": "Totals that set lambda. 'batch' (the paper): the generation batch over all ranks, measured "
            "before it is trained on: while transformers generates it, or by the scoring pass that TRL runs for vLLM. "
            "'running': the previous optimizer step; with vLLM it avoids TRL's scoring pass. 'micro': the live "
            "micro-batch of this rank, for ablation.",
        },
    )
    flow_lambda_max: float = field(
        default=0.1,
        metadata={
            "help": "Bound on |lambda| while no `flow_target` is set. The paper's lambda stays under 0.002; on short "
            "completions it is far larger, and balancing costs reward. 1.0 is the paper's unbounded rule."
        },
    )
    flow_shape: str | None = field(
        default=None,
        metadata={
            "help": "How the flow is changed. 'sign': tokens are weighted by the paper's 1 + lambda and 1 - lambda. "
            "'additive': an entropy bonus on the rows of `flow_rows`, whose coefficient is solved for. None: "
            "'additive' with a `flow_target` (and `sides='both'`), else 'sign'."
        },
    )
    flow_rows: str = field(
        default="right",
        metadata={
            "help": "Completions on which 'additive' acts: those that are 'right' (the first reward function gives "
            "more than 0.5 or, in a rollout without any such, the advantage is above 0; with a `flow_target` in the "
            "scope 'batch', of those without an advantage only as many as the push needs), those with an advantage "
            "above 0 ('advantaged', which leaves all zero-advantage rows to be dropped), or 'all'."
        },
    )
    flow_target: float | str | None = field(
        default=None,
        metadata={
            "help": "Entropy to hold. None: balance at every step, within `flow_lambda_max`; a number is in nats; "
            "'0.4x' is a fraction of the first step's entropy. Entropy falls freely until shortly before it, lands on "
            "it and is then held by lambda, between -0.5 and 2 (1 with `flow_shape='sign'`)."
        },
    )
    flow_sides: str = field(
        default="both",
        metadata={
            "help": "With a `flow_target`: whether entropy is brought back from 'both' sides of the target, or the "
            "target is only a 'floor'."
        },
    )
    flow_schedule: str = field(
        default="constant",
        metadata={
            "help": "How the target moves over the run: 'constant'; from the first step's entropy to the target, "
            "'linear' or 'cosine'; around the target by up to half of it, 'increase_decrease', "
            "'decrease_increase_decrease' or 'oscillating'; constant for the first half, then linearly down to half "
            "of it, 'hold_then_anneal'."
        },
    )
    resample_rounds: int = field(
        default=0,
        metadata={
            "help": "Dynamic sampling: rounds of generation, by the same policy, in which groups whose rewards are "
            "all equal are replaced by groups of fresh prompts. What still has no signal after them is trained on as "
            "it is. 0: no such round."
        },
    )
    resample_keep: str = field(
        default="informative",
        metadata={
            "help": "Groups that are not replaced: those with different rewards ('informative'); these and those "
            "whose completions are all right ('all_right') or all wrong ('all_wrong'), by the first reward function."
        },
    )
    zero_advantage_tokens: str = field(
        default="count",
        metadata={
            "help": "Whether the tokens of groups whose rewards are all equal 'count' in the number of tokens that "
            "the loss is divided by, as in TRL, or are left out of it ('leave_out'), with `loss_type` 'dapo', "
            "'cispo' or 'vespo'."
        },
    )
    micro_batching: str = field(
        default="exact",
        metadata={
            "help": "How a rollout is divided into micro-batches. 'exact' gives TRL's gradient from fewer tokens: "
            "padding is trimmed, rows are regrouped by length, and zero-advantage rows skip the backward, each where "
            "the loss allows it. 'trl' keeps TRL's grouping."
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
            "help": "On a NaN or infinite loss, gradient or reward: 'stop' before the update, with a dump of the "
            "rows, or 'skip' the step and count it (ten in a row stop the run). In fp16 the gradient scaler handles "
            "gradients."
        },
    )
    sampling_drift_max: float | None = field(
        default=0.1,
        metadata={
            "help": "Mean difference, in nats, between vLLM's log-probabilities and the policy's, above which vLLM's "
            "weights are suspected to be stale: a warning, and after five rollouts in a row an error. None disables "
            "the check."
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
        self.control_kwargs = check_map("control_kwargs", self.control_kwargs, '{"sides": "increase"}')
        for name in ("flow_target", "flow_shape"):  # a command line cannot else take back what a config file sets
            if str(getattr(self, name)).lower() in ("none", "null"):
                setattr(self, name, None)
        check_trl_values(self)
        self.sampling_drift_max = parse_drift_bound(self.sampling_drift_max)
        self._apply_presets(self.make_control())
        super().__post_init__()
        if self.hub_token is not None:
            self.hub_token = Secret(self.hub_token)
        if isinstance((self.model_init_kwargs or {}).get("token"), str):
            self.model_init_kwargs = {**self.model_init_kwargs, "token": Secret(self.model_init_kwargs["token"])}
        if self.hub_model_id is not None or self.push_to_hub:
            check_repo_id(
                self.hub_model_id or Path(self.output_dir).absolute().name,
                f"`hub_model_id={self.hub_model_id!r}` with `output_dir={self.output_dir!r}`",
            )
        for message in check_all(self, self.make_control()):
            if self.process_index == 0:
                warnings.warn(message, UserWarning, stacklevel=3)  # the line that made this configuration

    def make_control(self) -> Control:
        """Return a fresh control with the options of this configuration."""
        options = control_options(self.control)
        assert isinstance(self.control_kwargs, dict)  # since `__post_init__`
        fields = [name for name in (*CONTROL_FIELDS, *RUN_FIELDS) if name in options]
        for name in self.control_kwargs:
            if name in fields:
                raise ValueError(
                    f"`control_kwargs` sets {name!r}, which has a field of its own: set `{name}` instead."
                )
        return make_control(self.control, **{name: getattr(self, name) for name in fields}, **self.control_kwargs)

    def _apply_presets(self, control: Control) -> None:
        """Set the control's `presets`; raise if the user has set one of these fields to another value."""
        for name, value in control.presets.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, value):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` and `control={self.control!r}`, which sets it to {value!r}: "
                    "drop the field and use `control_kwargs`, or keep it and use `control='none'`."
                )
            setattr(self, name, value)

    def estimator_of(self, control: Control) -> str:
        """Return the flow estimator that `control` requires, or else that of this configuration."""
        return control.estimator or self.flow_estimator

    @property
    def active_fields(self) -> list[str]:
        """The fields of `CONTROL_FIELDS` that this control reads."""
        idle = self.make_control().idle_fields
        return [name for name in CONTROL_FIELDS if name in control_options(self.control) and name not in idle]

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches trained on before the next rollout is generated."""
        return self.steps_per_generation * self.num_iterations

    @property
    def spans_updates(self) -> bool:
        """Return whether a rollout is trained on in more than one update, so that TRL scores it itself."""
        return self.gradient_accumulation_steps % self.micro_batches_per_rollout != 0

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps taken on one generation batch; 1 is strictly on-policy."""
        return self.micro_batches_per_rollout / self.gradient_accumulation_steps

    def measuring(self, control: Control) -> str:
        """Return when the generation batch's flow is measured: `"ahead"` of its training; `"live"`, by the training
        forward, if one micro-batch is the rank's whole batch; or `"never"`."""
        estimator = self.estimator_of(control)
        if estimator in VOCABULARY_ESTIMATORS:
            return "ahead"
        if self.flow_scope != "batch" or not (control.needs_totals or estimator == "covariance"):
            return "never"
        one_micro_batch = self.updates_per_rollout == 1 and self.gradient_accumulation_steps == 1
        return "live" if one_micro_batch and not self.corrects_vllm else "ahead"

    @property
    def corrects_vllm(self) -> bool:
        """Return whether TRL scores every rollout, to weight it with the ratio of the policy to vLLM."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def corrects_live(self, control: Control) -> bool:
        """Return whether the training forward gives that ratio, so that TRL need not score the rollout."""
        scored = self.flow_scope == "batch" or self.measuring(control) == "ahead"
        return self.corrects_vllm and self.updates_per_rollout == 1 and not scored

    @property
    def updates_in_backward(self) -> bool:
        """Return whether parameters change inside the backward pass, before a gradient can be checked."""
        return self.deepspeed_plugin is not None or any(word in self.optim for word in ("lomo", "layerwise"))
