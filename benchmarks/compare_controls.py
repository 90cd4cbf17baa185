"""Which entropy control helps? All of them on one task, side by side, over seeds.

    make compare                                             # four settings, two seeds: about six minutes on two cores
    python benchmarks/compare_controls.py --group controls   # every control but those of `tracking`, three seeds
    python benchmarks/compare_controls.py --group tracking   # what holds a target: ten seeds, and three elsewhere
    python benchmarks/compare_controls.py --group signal     # what is done about groups without a signal: ten seeds
    python benchmarks/compare_controls.py --settings none "opefo, target" --seeds 0 1 --jitter 3
    python benchmarks/compare_controls.py --settings none clip_cov -- --learning_rate 3e-4

As many worker processes run as there are cores, each with one thread, and each trains many runs: `main` of train.py,
on configs/quickstart.yaml or on another `--config`. Arguments after `--` are passed to train.py.

A run ends as a line of a results file: benchmarks/results/GROUP.jsonl, or runs.jsonl in `--folder` where options
change the runs; `--results` names another. A run that is in the file is done, so a long comparison continues wherever
the file is, on another machine too. Each line has the options, the commit and the versions of its run. A file with
runs of other options is refused; delete lines to repeat their runs. An interrupted run resumes from its checkpoint in
`--folder`; one that fails is named with its log, and the others go on. The tables are written beside the file (.md),
two figures to `--folder`.

Settings that need several updates per rollout get four, with twice the optimizer steps, which is half the rollouts. On
the playground each trained model answers all held-out questions 64 times, with the sampler and the grader of eval.py:

    avg@16      share of right answers
    pass@16     questions with a right answer among 16 samples, unbiased estimate from 64
    end         mean of the last ten optimizer steps; the least is the least mean of ten steps
    distinct    distinct right answers of 64, mean over the questions
    calibration expected calibration error: |share right - confidence| over ten bins of the confidence, which is the
                geometric mean of the probabilities of a completion's tokens
    step time   relative to `none`, at the fastest tenth of the steps, since the others may have waited for other
                processes. It depends on the length of the completions; `benchmarks/overhead.py --controls` measures
                the control alone

comparison/statistics.py says what the other tables show. `--jitter N` repeats settings N times with their first seed,
and with micro-batches that are 2, 4, 8, ... times as many and as small: what differs then is rounding.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the workers

from comparison.figures import draw_curves, draw_plane
from comparison.jobs import Job, append_row, check_same, key_of, read_rows
from comparison.runs import run_all
from comparison.settings import Setting, fields_of, groups, settings
from comparison.tables import Comparison, document

from opefo_trl.cli.recipe_files import RECIPES, find_file
from opefo_trl.controls.target import EntropyTarget
from opefo_trl.validation import check_number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
JITTERED = ("none", "opefo, target")


def main() -> None:
    options = parse()
    by_name = settings(options.target)
    seeds = seeds_of(by_name, options)
    path = options.results or results_file(options)
    rows, jobs = read_rows(path), plan(by_name, seeds, options)
    in_file = [job_of(by_name, *key_of(row), options) for row in rows if row["setting"] in seeds]
    check_same(path, rows, in_file)
    done = {key_of(row) for row in rows}
    waiting = [job for job in jobs if job.key not in done]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are in {path}.", flush=True)
    failed = train(waiting, path, options)
    write({name: by_name[name] for name in seeds}, path, options)
    if failed:
        raise SystemExit(f"{failed} runs failed; their logs are named above. The same command repeats them.")


def parse() -> argparse.Namespace:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", default="reduced", choices=["reduced", "controls", "tracking", "signal", "all"])
    parser.add_argument("--settings", nargs="+", help="names of settings, in place of a group")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the group's; for --settings 0, 1, 2")
    parser.add_argument("--jitter", type=int, default=0, metavar="N", help="repetitions with other micro-batches")
    parser.add_argument("--jitter_settings", nargs="+", default=JITTERED, help="the settings that are repeated")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.4, help="nats, for methods with a target entropy")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "controls", help="for runs, logs and figures")
    parser.add_argument("--results", type=Path, help="the file with a line for each run")
    options = parser.parse_args(sys.argv[1:end])
    options.more = sys.argv[end + 1 :]
    try:
        for name in ("steps", "jobs"):
            check_number(name, getattr(options, name), 1)
        EntropyTarget(options.target, name="target")
        options.config = find_file("config", str(options.config), RECIPES)
        if options.results and options.results.is_dir():
            raise ValueError(f"`results={str(options.results)!r}` is a folder. Give a file, such as runs.jsonl.")
    except ValueError as error:
        parser.error(str(error))
    options.committed = not options.more and not options.settings
    options.committed &= all(
        getattr(options, name) == parser.get_default(name) for name in ("steps", "target", "config")
    )
    return options


def results_file(options: argparse.Namespace) -> Path:
    """Return the committed file of a group, or a file in the folder where options change the runs."""
    return RESULTS / f"{options.group}.jsonl" if options.committed else options.folder / "runs.jsonl"


def seeds_of(by_name: dict[str, Setting], options: argparse.Namespace) -> dict[str, list[int]]:
    """Return the settings to compare, each with its seeds."""
    counts = groups(by_name, options.target)[options.group]
    if options.settings:
        counts = dict.fromkeys(options.settings, 3)
    for name in [*counts, *(options.jitter_settings if options.jitter else [])]:
        if name not in by_name:
            raise SystemExit(f"The setting {name!r} is unknown. Choose of: {', '.join(map(repr, by_name))}.")
    return {name: options.seeds or list(range(count)) for name, count in counts.items()}


def plan(by_name: dict[str, Setting], seeds: dict[str, list[int]], options: argparse.Namespace) -> list[Job]:
    """Return all runs: seed by seed, so that every setting has some soon, then those for rounding."""
    every = options.seeds or range(max(map(len, seeds.values())))
    keys = [(name, seed, 1) for seed in every for name, some in seeds.items() if seed in some]
    repeated = [name for name in seeds if name in options.jitter_settings]
    if options.jitter and not repeated:
        raise SystemExit(
            f"`--jitter` repeats {', '.join(options.jitter_settings)}: name others with --jitter_settings."
        )
    keys += [(name, seeds[name][0], 2 ** (1 + number)) for number in range(options.jitter) for name in repeated]
    return [job_of(by_name, *key, options) for key in keys]


def job_of(by_name: dict[str, Setting], name: str, seed: int, split: int, options: argparse.Namespace) -> Job:
    setting = by_name[name]
    given = fields_of(setting, seed, options.steps, options.config, options.more, split)
    return Job(name, seed, split, setting.target, setting.updates, options.config, given, options.folder.resolve())


def train(jobs: list[Job], path: Path, options: argparse.Namespace) -> int:
    """Run what is not in the file yet, print a line for each, and return how many failed."""
    failed, begun = 0, time.monotonic()
    for number, (job, outcome) in enumerate(run_all(jobs, options.jobs), 1):
        if isinstance(outcome, Exception):
            failed += 1
            print(f"{job.name} failed: {outcome}; its log is {job.log}", flush=True)
        else:
            append_row(path, {**outcome, "command": command()})
        rest = (time.monotonic() - begun) / number * (len(jobs) - number) / 60
        print(f"[{number:3}/{len(jobs)}] {job.name}: {rest:.0f} min to go", flush=True)
    return failed


def command() -> str:
    return " ".join(["python benchmarks/compare_controls.py", *map(shlex.quote, sys.argv[1:])])


def write(shown: dict[str, Setting], path: Path, options: argparse.Namespace) -> None:
    """Write the tables and the figures of the runs in the file."""
    comparison = Comparison([row for row in read_rows(path) if row["setting"] in shown], shown)
    if not comparison.rows:
        return
    text = document(comparison, command())
    path.with_suffix(".md").write_text(text)
    options.folder.mkdir(parents=True, exist_ok=True)
    draw_curves(comparison, options.folder / f"{path.stem}.png")
    draw_plane(comparison, options.folder / f"{path.stem}_plane.png")
    print(f"\n{text}\nWrote {path.with_suffix('.md')}, and two figures to {options.folder}")


if __name__ == "__main__":
    main()
