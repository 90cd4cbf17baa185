"""control_state.json, in every checkpoint: state of the entropy control, the step guard, the prompts' order and the
scores of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opefo_trl.files import CONTROL_STATE_FILE, write_whole
from opefo_trl.flow import FlowTotals

if TYPE_CHECKING:
    import torch

    from opefo_trl.controls import Control
    from opefo_trl.training.generation_scores import GenerationScores
    from opefo_trl.training.guards import StepGuard
    from opefo_trl.training.resampling import PromptOrder


def save_control_state(
    checkpoint: Path,
    name: str,
    control: Control,
    totals: FlowTotals | None,
    guard: StepGuard,
    prompts: PromptOrder | None = None,
    scores: GenerationScores | None = None,
) -> None:
    """Write the state into a checkpoint. `totals` are those of the last optimizer step; `prompts` is None without
    dynamic sampling."""
    content: dict[str, Any] = {
        "control": name,
        "state": control.state_dict(),
        "totals": None if totals is None else totals.sums.tolist(),
        "guard": guard.state_dict(),
        "prompts": None if prompts is None else prompts.state_dict(),
        **({} if scores is None else {"generation": scores.state_dict()}),
    }
    try:
        text = json.dumps(content, indent=2)
    except TypeError as error:
        raise TypeError(f"`state_dict()` of `control={name!r}` must be JSON, got {content['state']!r}.") from error
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_whole(checkpoint / CONTROL_STATE_FILE, lambda part: part.write_text(text))


def load_control_state(
    checkpoint: Path,
    name: str,
    control: Control,
    guard: StepGuard,
    device: torch.device,
    prompts: PromptOrder | None = None,
    scores: GenerationScores | None = None,
) -> tuple[FlowTotals | None, str | None]:
    """Restore control, guard, prompts and scores; return the totals of the last optimizer step, and a warning, if
    any."""
    path = checkpoint / CONTROL_STATE_FILE
    if not path.exists():
        return None, f"{path} does not exist: the entropy control starts with no state."
    try:
        content = json.loads(path.read_text())
        guard.load_state_dict(content["guard"])
        warnings = []
        order = content.get("prompts")
        if prompts is not None and order is not None:
            prompts.load_state_dict(order)
        elif (prompts is None) != (order is None):
            rounds = "`resample_rounds=0`" if order is None else "`resample_rounds` above 0"
            warnings.append(f"{path} was written with {rounds}: the prompts come in another order from here on.")
        if scores is not None and "generation" in content:
            scores.load_state_dict(content["generation"])
        totals = None if content["totals"] is None else FlowTotals.load(content["totals"], device)
        if content["control"] != name:
            written = f"The checkpoint was written with `control={content['control']!r}`"
            warnings.append(f"{written}; `control={name!r}` starts with no state.")
        else:
            control.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint, or delete the "
            "file to let the entropy control start with no state."
        ) from error
    return totals, " ".join(warnings) or None
