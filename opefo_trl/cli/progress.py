"""What a run shows while it goes on, and when it is done."""

from __future__ import annotations

from typing import Any

import pandas as pd
from transformers.trainer_callback import ProgressCallback

SHOWN = {"reward": "reward", "entropy": "entropy", "flow/lambda": "lambda"}
TABLE = {
    "reward": "reward",
    "entropy": "entropy, nats per token",
    "flow/increase_share": "share of the flow that raises",
    "answers/distinct": "distinct right answers a group",
}
EDGE = 10  # steps at each end that the table averages


class EntropyProgress(ProgressCallback):
    """The Trainer's bar with reward, entropy and lambda behind it, in place of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None:
            shown = {word: logs[name] for name, word in SHOWN.items() if logs.get(name) is not None}
            if shown:
                self.training_bar.set_postfix({word: f"{value:.3f}" for word, value in shown.items()}, refresh=False)


def table_of(frame: pd.DataFrame) -> str:
    """Start and end of a run: means over its first and last steps."""
    edge = min(EDGE, max(1, len(frame) // 2))
    lines = [f"{'':<32}{'start':>9}      {'end':>9}"]
    for column, words in TABLE.items():
        if column in frame:
            start, end = frame[column].head(edge).mean(), frame[column].tail(edge).mean()
            lines.append(f"{words:<32}{start:>9.3f}  ->  {end:>9.3f}")
    return "\n".join(lines)


def sentence_of(scores: dict[str, Any]) -> str:
    """What an evaluation found; a measure that nothing could be said of is a dash."""

    def shown(name: str, form: str) -> str:
        value = scores.get(f"eval_{name}")
        return "-" if value is None else format(value, form)

    return (
        f"reward {shown('reward', '.3f')}, entropy {shown('entropy', '.3f')}, "
        f"{shown('answers/distinct', '.1f')} distinct right answers, {shown('answers/solved', '.0%')} of the prompts "
        "solved"
    )
