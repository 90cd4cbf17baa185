"""Training sets as tasks to sample: prompts and judge are those of training, scores are the problems' pass rates."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from opefo_trl.data.loading import FORMATS
from opefo_trl.data.pass_rates import write_pass_rates
from opefo_trl.data.templates import problem_text, with_template
from opefo_trl.evaluation.samples import Task, tokenize_prompts
from opefo_trl.grading import Grade, Grader, Outcome
from opefo_trl.grading.grader import cores_of_rank
from opefo_trl.playground import TASKS
from opefo_trl.rewards import MathReward
from opefo_trl.training.answer_diversity import RIGHT

__all__: list[str] = []

DEFAULT_K = 8  # for each problem, by default
_OF_A_TRAINING = {"completion_ids", "trainer_state", "environments"}  # arguments that only a training has


class RewardGrader:
    """Grades with a reward function of one's own. A gold is the whole row, as reward functions may read any column."""

    def __init__(self, reward: Callable[..., Any]):
        self.reward = reward
        self.normal_form = getattr(reward, "normal_form", None)
        for parameter in inspect.signature(reward).parameters.values():
            if parameter.name in _OF_A_TRAINING and parameter.default is parameter.empty:
                raise ValueError(
                    f"The first reward function takes {parameter.name!r}, which only a training has, so it cannot "
                    "judge here. Name the one first that judges the answers: --reward_funcs NAME."
                )

    def grade(self, golds: Sequence[dict[str, Any]], completions: Sequence[str]) -> list[Grade]:
        prompts = [row["prompt"] for row in golds]
        rewards = self.reward(
            prompts=prompts,
            completions=[
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            log_extra=_log_nothing,
            log_metric=_log_nothing,
            **{name: [row[name] for row in golds] for name in golds[0] if name not in ("prompt", "completion")},
        )
        rewards = asyncio.run(rewards) if inspect.iscoroutine(rewards) else rewards
        return [
            Grade(_outcome_of(reward), self.normal_form(text) if self.normal_form else None)
            for reward, text in zip(rewards, completions, strict=True)
        ]


def _log_nothing(name: str, values: Any) -> None:
    """Take the place of TRL's `log_extra` and `log_metric`."""


def _outcome_of(reward: float | None) -> Outcome:
    if reward is None or reward != reward:
        return Outcome.ERROR
    return Outcome.CORRECT if reward > RIGHT else Outcome.WRONG


def training_task(
    dataset: str,
    split: str,
    rows: Dataset,
    template: str,
    tokenizer: Any,
    reward: Callable[..., Any],
    k: int,
    **chat_options: Any,
) -> Task:
    """
    Return the task of sampling the cleaned rows of a data set, with the prompts that they have in training. Its name,
    from which files get theirs, is `gsm8k-train` for `openai/gsm8k`.
    """
    path = Path(dataset)
    name = f"{path.stem if path.suffix in FORMATS else path.name}-{split}"  # a name on the Hub may have a dot
    embedded = TASKS.get(dataset)
    prompted = with_template(rows, template)
    others = [column for column in rows.column_names if column != "prompt"]
    problems = [
        {
            "id": f"{name}-{index}",
            "problem": problem_text(row["prompt"]),
            "answer": str(row["answer"] if "answer" in others else [row[column] for column in others]),
        }
        for index, row in enumerate(rows)
    ]
    prompts = tokenize_prompts(prompted["prompt"], tokenizer, **chat_options)
    longest = None if embedded is None else embedded.max_new_tokens
    if not isinstance(reward, MathReward):
        return Task(name, problems, prompts, k, longest, RewardGrader(reward), prompted)
    policy, timeout, _ = reward.options
    grader = Grader(cores_of_rank(), timeout, policy)  # counted before vLLM starts
    return Task(name, problems, prompts, k, longest, grader, list(rows["answer"]))


def report_pass_rates(folder: Path, task: Task, frame: pd.DataFrame) -> str:
    """Write the pass rates of a task's samples to the folder, and return a summary. Ungraded samples are not right."""
    right = (frame["outcome"] == Outcome.CORRECT).groupby(frame["id"], sort=False).sum()
    problems = [row["problem"] for row in task.problems]
    counts = [int(right[row["id"]]) for row in task.problems]
    return f"{task.name}: {write_pass_rates(folder / f'{task.name}.jsonl', problems, counts, task.k)}"
