"""Checks of an `OPEFOConfig` and its control: pure functions that raise errors and return warnings.

Each takes the configuration as `args`. It is typed as TRL's `GRPOConfig`, since config.py imports this module.
"""

from __future__ import annotations

import math
from typing import Any

from trl import GRPOConfig

from opefo_trl.controls import Control, control_options
from opefo_trl.controls.options import CONTROL_FIELDS
from opefo_trl.flow import ESTIMATORS
from opefo_trl.validation import check_bool, check_choice, check_number

__all__: list[str] = []  # of use inside this package only

_CHOICES = {
    "flow_estimator": ESTIMATORS,
    "flow_scope": ("batch", "running", "micro"),
    "nonfinite": ("stop", "skip"),
    "micro_batching": ("exact", "trl"),
    "resample_keep": ("informative", "all_right", "all_wrong"),
    "zero_advantage_tokens": ("count", "leave_out"),
}
# TRL's and transformers' own, which they judge late (in the first step's loss, after a rollout) or not at all
_LOSS_TYPES = ("dapo", "dr_grpo", "grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "num_generations", "max_completion_length")
_RANGES: dict[str, dict[str, Any]] = {
    "temperature": {"above": 0},
    "top_p": {"above": 0, "high": 1},
    "learning_rate": {"low": 0, "high": 1e6},
    "beta": {"low": 0},
    "epsilon": {"low": 0},
    "epsilon_high": {"low": 0},
    "vllm_gpu_memory_utilization": {"above": 0, "high": 1},
    "seed": {"low": 0, "high": 2**32 - 1},
}


def check_trl_values(args: GRPOConfig) -> None:
    """Check fields of TRL before TRL computes with them."""
    if args.output_dir == "":
        raise ValueError("`output_dir=''` is empty. Give a folder.")
    check_choice("loss_type", args.loss_type, _LOSS_TYPES)
    if args.scale_rewards not in (True, False):
        check_choice("scale_rewards", args.scale_rewards, ("group", "batch", "none"))
    for name in _COUNTS:
        if (value := getattr(args, name)) is not None:
            check_number(name, value, 1, whole=True)
    for name, bounds in _RANGES.items():
        if (value := getattr(args, name)) is not None:
            check_number(name, value, **bounds)
    for weight in args.reward_weights or ():
        check_number("reward_weights", weight, -1e6, 1e6, why=f"The list is {args.reward_weights}.")


def check_all(args: GRPOConfig, control: Control) -> list[str]:
    """Raise a `ValueError` for what cannot be right; return warnings about what is doubtful."""
    check_values(args)
    check_guards(args)
    check_processes(args)
    return [
        *check_on_policy(args, control),
        *check_loss(args, control),
        *check_sampling(args, control),
        *conflicts_with_trl(args, control),
        *idle_fields(args, control),
        *checkpoints_inside_a_rollout(args),
        *unverified_source(args, control),
    ]


def check_values(args: GRPOConfig) -> None:
    """Check the fields that can be judged one by one."""
    for name in ("strict_on_policy", "entropy_curves"):
        check_bool(name, getattr(args, name))
    accumulation = args.gradient_accumulation_steps
    check_number("gradient_accumulation_steps", accumulation, 1, why="It is the micro-batches of an optimizer step.")
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(args, name), choices)


def check_guards(args: GRPOConfig) -> None:
    """Check that a step can be skipped where `nonfinite` asks for it."""
    if args.nonfinite == "skip" and args.updates_in_backward:
        raise ValueError(
            "`nonfinite='skip'` cannot work under DeepSpeed or with a layer-wise optimizer, which update the "
            "parameters inside the backward pass. Use `nonfinite='stop'`, which checks the loss before it."
        )


def check_processes(args: GRPOConfig) -> None:
    """Refuse several GPUs in one process: transformers would split each batch over them by `nn.DataParallel`, which
    TRL's rollouts do not know."""
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and needs one of its own. Start a process for each (`opefo-trl "
            "train`, or `accelerate launch`), or let it see a single one: CUDA_VISIBLE_DEVICES=0."
        )


def check_on_policy(args: GRPOConfig, control: Control) -> list[str]:
    """Check the number of optimizer steps per rollout; warn about a control that needs more than one."""
    sizes = (
        f"`steps_per_generation={args.steps_per_generation}` with `gradient_accumulation_steps="
        f"{args.gradient_accumulation_steps}`"
    )
    if not args.strict_on_policy:
        if args.flow_scope == "batch" and control.needs_totals and not args.updates_per_rollout.is_integer():
            raise ValueError(
                f"{sizes} lets an optimizer step span several rollouts, and `flow_scope='batch'` would set its lambda "
                "by the first of them. Use `flow_scope='running'`, or make `steps_per_generation` a multiple of "
                "`gradient_accumulation_steps`."
            )
    elif args.num_iterations != 1:
        raise ValueError(
            f"`num_iterations={args.num_iterations}` trains {args.num_iterations} times on one rollout; OPEFO is "
            "strictly on-policy. Set `num_iterations=1`, or pass `strict_on_policy=False`."
        )
    elif args.steps_per_generation != args.gradient_accumulation_steps:
        raise ValueError(
            f"{sizes} takes {args.updates_per_rollout:g} optimizer steps per rollout; OPEFO is strictly on-policy and "
            "takes 1. Set them equal, or pass `strict_on_policy=False`."
        )
    if control.acts_on_policy or args.updates_per_rollout > 1:
        return []
    return [
        f"`control={args.control!r}` has no effect strictly on-policy, where the ratio of every token is 1. It needs "
        f"`strict_on_policy=False` and several updates per rollout, such as `steps_per_generation="
        f"{4 * args.gradient_accumulation_steps}` (4 updates)."
    ]


def check_loss(args: GRPOConfig, control: Control) -> list[str]:
    """Check that TRL's loss can express what the control does."""
    by_sequence = args.importance_sampling_level == "sequence"
    if control.shapes_tokens and by_sequence:
        raise ValueError(
            "`importance_sampling_level='sequence'` gives every token of a completion the same gradient, so the token "
            f"weights of `control={args.control!r}` would be averaged away. Use `importance_sampling_level='token'`, "
            "`control='none'`, or OPEFO with `flow_shape='additive'`."
        )
    if control.uses_clip_range and args.loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"`control={args.control!r}` adjusts the clip range, which `loss_type={args.loss_type!r}` ignores or "
            "interprets differently. Use `loss_type='dapo'`, 'dr_grpo', 'grpo' or 'bnpo'."
        )
    if control.uses_clip_range and not control.presets and by_sequence:
        raise ValueError(
            f"`control={args.control!r}` bounds the ratio of each token, but `importance_sampling_level='sequence'` "
            "has one ratio for a whole completion. Use `importance_sampling_level='token'`."
        )
    if control.unclipped and args.delta is not None:
        raise ValueError(
            f"`delta={args.delta}` cuts the ratio of tokens that `control={args.control!r}` leaves unclipped. Drop it."
        )
    if control.estimator and args.loss_type in ("grpo", "sapo"):
        raise ValueError(
            f"`control={args.control!r}` compares the flow of single tokens, which `loss_type={args.loss_type!r}` "
            "weights by the length of their completion. Use `loss_type='dapo'`."
        )
    estimator = args.estimator_of(control)
    if estimator in ("covariance", "expected") and control.makes_push:
        why = "compares tokens of a batch" if estimator == "covariance" else "is the same for all tokens of a position"
        raise ValueError(
            f"`flow_estimator={estimator!r}` {why}, so the flow of a push on one token is unknown. "
            "Use `flow_estimator='sampled'` with `flow_shape='additive'`, or `flow_shape='sign'`."
        )
    if (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError(
            "`liger_kernel_config={'fused_linear_cross_entropy': True}` replaces the forward that log-probabilities "
            "and entropies come from. Drop that key; Liger's other kernels are fine."
        )
    if control.shapes_tokens and args.loss_type == "luspo":
        return [
            "`loss_type='luspo'` is a sequence-level objective. With `importance_sampling_level='token'`, which token "
            f"weights such as those of `control={args.control!r}` need, it is a plain sum over tokens and no longer "
            "LUSPO. `loss_type='dapo'` is the same with a better normaliser."
        ]
    return []


def check_sampling(args: GRPOConfig, control: Control) -> list[str]:
    """Check the rounds of dynamic sampling, and that tokens can be left out of the loss' denominator."""
    rounds = args.resample_rounds
    if check_number("resample_rounds", rounds, 0, why="0 is off.") % 1 or not isinstance(rounds, int):
        raise ValueError(f"`resample_rounds={rounds!r}` must be a whole number. 0 is off.")
    if args.zero_advantage_tokens == "leave_out":
        reason = _counts_other_than_tokens(args) or _trains_all_tokens(args, control)
        if reason is not None:
            raise ValueError(
                f"`zero_advantage_tokens='leave_out'` takes tokens without a gradient out of the loss' denominator, "
                f"but {reason}. Use `zero_advantage_tokens='count'`."
            )
    if args.resample_keep != "informative" and not rounds:
        return [f"`resample_keep={args.resample_keep!r}` has no effect with `resample_rounds=0`."]
    return []


def _counts_other_than_tokens(args: GRPOConfig) -> str | None:
    """Return why the loss has no number of tokens of the whole rollout to take them out of, or None."""
    reasons = {
        "bnpo": "divides by the tokens of each micro-batch, so one with few others would outweigh the rest",
        "dr_grpo": "divides by a constant, `max_completion_length`",
        "grpo": "takes the mean of each completion",
        "sapo": "takes the mean of each completion",
        "luspo": "takes the mean over completions",
    }
    reason = reasons.get(args.loss_type)
    return None if reason is None else f"`loss_type={args.loss_type!r}` {reason} ('dapo', 'cispo' and 'vespo' can)"


def _trains_all_tokens(args: GRPOConfig, control: Control) -> str | None:
    """Return why tokens of every group have a gradient, or None."""
    if args.beta:
        return f"`beta={args.beta}` gives every token one, from the reference model"
    if not control.keeps_zeros or control.trained_zeros == "any":
        return f"`control={args.control!r}` may give one to tokens of every group"
    return None


def conflicts_with_trl(args: GRPOConfig, control: Control) -> list[str]:
    """Return warnings about settings of TRL that work against a control, or that its flows leave out."""
    if not (control.shapes_tokens or control.makes_push):
        return []
    warnings = []
    if args.use_adaptive_entropy or args.entropy_coef != 0:
        name = "use_adaptive_entropy=True" if args.use_adaptive_entropy else f"entropy_coef={args.entropy_coef}"
        warnings.append(
            f"`{name}` pushes entropy at the same time as `control={args.control!r}`: the flows do not include the "
            "bonus, so the two work against each other. Keep one of them."
        )
    masks_tokens, masks_completions = args.top_entropy_quantile < 1, args.off_policy_mask_threshold is not None
    filters = {"top_entropy_quantile": masks_tokens, "off_policy_mask_threshold": masks_completions}
    return warnings + [
        f"`{name}={getattr(args, name)}` removes tokens from the loss after `control={args.control!r}` has counted "
        "their flow, so lambda balances tokens outside the loss."
        for name, is_set in filters.items()
        if is_set
    ]


def idle_fields(args: GRPOConfig, control: Control) -> list[str]:
    """Return warnings about fields that were set and that nothing reads."""
    options = control_options(args.control)
    idle = {name: "it takes no such option" for name in CONTROL_FIELDS if name not in options}
    if not (control.needs_totals or args.corrects_vllm):
        idle["flow_scope"] = "it does not observe the flow"
    if control.estimator:
        idle["flow_estimator"] = f"it needs {control.estimator!r}"
    defaults = type(args).__dataclass_fields__
    return [
        f"`control={args.control!r}` does not use `{name}={getattr(args, name)!r}`: {reason}."
        for name, reason in {**idle, **control.idle_fields}.items()
        if getattr(args, name) != defaults[name].default
    ]


def checkpoints_inside_a_rollout(args: GRPOConfig) -> list[str]:
    """Return a warning if checkpoints may fall between two optimizer steps of one rollout."""
    micro_batches = math.lcm(args.micro_batches_per_rollout, args.gradient_accumulation_steps)
    period = micro_batches // args.gradient_accumulation_steps
    if period == 1 or args.save_strategy not in ("steps", "best"):
        return []
    name = "save_steps" if args.save_strategy == "steps" else "eval_steps"
    every = getattr(args, name) or args.logging_steps  # the Trainer's own default of `eval_steps`
    if every < 1:  # a share of the run; below 0 when nobody knows how long it is
        every = math.ceil(every * args.max_steps)
    if every > 0 and every % period == 0:
        return []
    return [
        f"`{name}={getattr(args, name)}` may place checkpoints inside a rollout of {period} optimizer steps. Resuming "
        f"from one of them generates a new rollout and does not continue bit for bit. Use a multiple of {period}."
    ]


def unverified_source(args: GRPOConfig, control: Control) -> list[str]:
    """Return a warning about a control that is not verified."""
    if control.source is None:
        return []
    return [f"`control={args.control!r}` is not verified against its authors' text or code: {control.source}."]


def parse_drift_bound(value: Any) -> float | None:
    """Return `sampling_drift_max` as a number, or None for no bound; YAML and shells give text."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    return check_number("sampling_drift_max", value, above=0, why="It is in nats; `None` disables the check.")
