"""Progress of a run: the bar while it trains, and summaries at its end."""

from __future__ import annotations

from typing import Any

import pandas as pd
from transformers.trainer_callback import ProgressCallback

__all__ = ["EntropyProgress"]

TABLE = {  # column of the curves -> its name in the table
    "reward": "reward",
    "entropy": "entropy, nats per token",
    "flow/increase_share": "share of the flow that raises",
    "answers/distinct": "distinct right answers a group",
}
EDGE = 10  # steps at each end that the table averages
_BAR = {
    "reward": "reward",
    "entropy": "entropy",
    "flow/lambda": "lambda",
    "batching/signal_share": "with signal",
}  # metric -> its name on the bar


class EntropyProgress(ProgressCallback):
    """The Trainer's bar, followed by reward, entropy and lambda instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None:
            values = {label: f"{logs[name]:.3f}" for name, label in _BAR.items() if logs.get(name) is not None}
            if values:
                self.training_bar.set_postfix(values, refresh=False)


def table_of(frame: pd.DataFrame) -> str:
    """Return a table of the means over the first and the last steps of a run."""
    edge = min(EDGE, max(1, len(frame) // 2))
    lines = [f"{'':<32}{'start':>9}      {'end':>9}"]
    for column, label in TABLE.items():
        if column in frame:
            start, end = frame[column].head(edge).mean(), frame[column].tail(edge).mean()
            lines.append(f"{label:<32}{start:>9.3f}  ->  {end:>9.3f}")
    return "\n".join(lines)


def sentence_of(scores: dict[str, Any]) -> str:
    """Return the main scores of an evaluation in words, with a dash for a missing one."""

    def shown(name: str, form: str) -> str:
        value = scores.get(f"eval_{name}")
        return "-" if value is None else format(value, form)

    return (
        f"reward {shown('reward', '.3f')}, entropy {shown('entropy', '.3f')}, "
        f"{shown('answers/distinct', '.1f')} distinct right answers, {shown('answers/solved', '.0%')} of the prompts "
        "solved"
    )
