"""Measures of a finished run, small enough to be committed: a few numbers, and the entropy of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers.utils.logging import disable_progress_bar

from comparison.jobs import SAMPLES, Job
from comparison.statistics import longest_run
from opefo_trl.cli.progress import EDGE
from opefo_trl.curves import EntropyCurves
from opefo_trl.evaluation.engines import Decoding, Engine, ModelSource, Sample, Transformers
from opefo_trl.evaluation.metrics import avg_at_k, calibration_error, pass_at_k
from opefo_trl.evaluation.samples import TaskGrader, tokenize_prompts
from opefo_trl.grading import Outcome
from opefo_trl.playground import PLAYGROUND, TASKS, playground_dataset

K = 16
LEARNED = 0.9  # reward, as a mean of ten steps, that counts as learned
LONGEST = 12  # tokens of an answer


def measure(job: Job) -> dict[str, Any]:
    """Return the measures of a run, and the entropy of each step beside its target."""
    frame = EntropyCurves.load(job.out).to_pandas()
    row = {
        "end_entropy": frame["entropy"].tail(EDGE).mean(),
        "least_entropy": frame["entropy"].rolling(EDGE, min_periods=1).mean().min(),
        "mean_entropy": frame["entropy"].mean(),
        "reward": frame["reward"].tail(EDGE).mean(),
        # over whole rollouts
        "seconds": frame["time"].diff().rolling(job.updates, min_periods=1).mean().quantile(0.1),
        **held_out(job),
    }
    row = {name: round(value, 6) for name, value in row.items() if not math.isnan(value)}
    if "flow/bounded" in frame:
        row["bounded"] = longest_run(frame["flow/bounded"] > 0.5)
    if (learned := learned_at(frame)) is not None:
        row["learned"] = learned
    return {**row, "weights": weights_hash(job.out), "entropy": rounded(frame["entropy"]), **target_of(job, frame)}


def learned_at(frame: pd.DataFrame) -> dict[str, float] | None:
    """Return step, generated tokens and seconds after which the reward has reached `LEARNED`; None if it never has."""
    reached = frame[frame["reward"].rolling(EDGE, min_periods=EDGE).mean() >= LEARNED]
    if reached.empty:
        return None
    row, first = reached.iloc[0], frame.iloc[0]
    return {
        "step": int(row["step"]),
        "tokens": int(row["num_tokens"]),
        "seconds": round(row["time"] - first["time"], 1),
    }


def target_of(job: Job, frame: pd.DataFrame) -> dict[str, Any]:
    """Return the target of each step if the run logs one, else the setting's, or nothing."""
    if "flow/target" not in frame:
        return {} if job.target is None else {"target": job.target}
    steps = rounded(frame["flow/target"])
    return {"target": steps[0] if len(set(steps)) == 1 else steps}


def rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 5) for value in values]


def weights_hash(folder: Path) -> str:
    """Return a hash of the trained weights, which shows whether two runs are equal to the last bit."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def graded(
    engine: Engine, grader: TaskGrader, prompts: Sequence[list[int]], golds: Sequence[Any], longest: int, count: int
) -> tuple[list[list[Sample]], list[list[bool]], list[int]]:
    """Sample `count` answers to each prompt; return them, whether they are right, and how many right ones differ."""
    answers, right, distinct = [], [], []
    for seed, (prompt, gold) in enumerate(zip(prompts, golds, strict=True)):
        samples = engine.sample([prompt] * count, [seed] * count, [longest] * count)
        grades = grader.grade([gold] * count, [sample.text for sample in samples])
        answers.append(samples)
        right.append([grade.outcome == Outcome.CORRECT for grade in grades])
        distinct.append(len({grade.answer for grade in grades if grade.outcome == Outcome.CORRECT}))
    return answers, right, distinct


def held_out(job: Job) -> dict[str, float]:
    """Return the scores on all held-out questions of the playground; nothing for another task."""
    if job.fields.get("dataset_name") != PLAYGROUND:
        return {}
    disable_progress_bar()
    source = ModelSource(str(job.out))
    tokenizer, grader = source.tokenizer(), TaskGrader(TASKS[PLAYGROUND])
    engine = Transformers(source, Decoding(temperature=1.0, top_p=1.0, max_new_tokens=LONGEST), tokenizer)
    rows = playground_dataset("test")
    prompts = tokenize_prompts(rows["prompt"], tokenizer)
    samples, right, distinct = graded(engine, grader, prompts, rows["target"], LONGEST, SAMPLES)
    confidence = [[math.exp(sample.logp / sample.tokens) for sample in of_prompt] for of_prompt in samples]
    return {
        "avg16": avg_at_k(right),
        "pass16": pass_at_k(right, K),
        "distinct": sum(distinct) / len(distinct),
        "calibration": calibration_error(np.ravel(confidence), np.ravel(right)),
    }
