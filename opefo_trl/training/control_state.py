"""control_state.json, in every checkpoint: the state of the entropy control, the step guard and the prompts' order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opefo_trl.files import CONTROL_STATE_FILE, write_whole
from opefo_trl.flow import FlowTotals

if TYPE_CHECKING:
    import torch

    from opefo_trl.controls import Control
    from opefo_trl.training.guards import StepGuard
    from opefo_trl.training.resampling import PromptOrder


def save_control_state(
    checkpoint: Path,
    name: str,
    control: Control,
    totals: FlowTotals | None,
    guard: StepGuard,
    prompts: PromptOrder | None = None,
) -> None:
    """Write the state into a checkpoint. `totals` are those of the last optimizer step; `prompts` is None without
    dynamic sampling."""
    content: dict[str, Any] = {
        "control": name,
        "state": control.state_dict(),
        "totals": None if totals is None else totals.sums.tolist(),
        "guard": guard.state_dict(),
        "prompts": None if prompts is None else prompts.state_dict(),
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
) -> tuple[FlowTotals | None, str | None]:
    """Restore control, guard and prompts; return the totals of the last optimizer step, and a warning, if any."""
    path = checkpoint / CONTROL_STATE_FILE
    if not path.exists():
        return None, f"{path} does not exist: the entropy control starts with no state."
    try:
        content = json.loads(path.read_text())
        guard.load_state_dict(content["guard"])
        if prompts is not None and content.get("prompts") is not None:
            prompts.load_state_dict(content["prompts"])
        totals = None if content["totals"] is None else FlowTotals.load(content["totals"], device)
        if content["control"] != name:
            written = f"The checkpoint was written with `control={content['control']!r}`"
            return totals, f"{written}; `control={name!r}` starts with no state."
        control.load_state_dict(content["state"])
        if prompts is not None and content.get("prompts") is None:
            return totals, f"{path} was written with `resample_rounds=0`: the prompts begin with the first one again."
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Resume from another checkpoint, or delete the "
            "file to let the entropy control start with no state."
        ) from error
    return totals, None
