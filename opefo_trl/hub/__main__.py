"""python -m opefo_trl.hub push OUT: bring to the Hub what of a run is not there, or not yet.

`attempt OUT` is what a training starts: one attempt for what waits, whose outcome is the last line, as JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from opefo_trl.hub import outbox, upload
from opefo_trl.hub.outbox import STRATEGIES, Target
from opefo_trl.hub.upload import check_repo, patiently


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opefo_trl.hub", description="Push a run to the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    by_hand = commands.add_parser("push", help="push what of a run is not on the Hub")
    by_hand.add_argument("run", type=Path, metavar="OUT", help="the run's output folder")
    by_hand.add_argument("--hub_model_id", help="repository (default: the one that the run was given)")
    by_hand.add_argument("--hub_private_repo", action="store_true", help="make it private, if it is made")
    by_hand.add_argument("--hub_revision", help="branch to commit to")
    by_hand.add_argument("--hub_strategy", choices=STRATEGIES, help="which checkpoints go there (default: the run's)")
    for_training = commands.add_parser("attempt", help="what a training starts; its last line is JSON")
    for_training.add_argument("run", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    upload.set_timeouts()
    if options.command == "attempt":
        return _attempt(options.run)
    try:
        target = target_of(options)
        if options.hub_model_id or options.hub_revision:
            outbox.readdress(options.run, target)
        return push_run(options.run, target)
    except (ValueError, OSError) as error:
        print(f"python -m opefo_trl.hub: error: {error}", file=sys.stderr)
        return 2


def _attempt(run: Path) -> int:
    target = Target.read(run)
    assert target is not None, f"{run} has no target"
    outcome = upload.attempt(run, target)
    print(outcome.to_json())
    return 0


def target_of(options: argparse.Namespace) -> Target:
    run = options.run
    if not run.is_dir():
        raise ValueError(f"There is no folder {str(run)!r}. Give the `output_dir` of a run.")
    known = Target.read(run) or Target(options.hub_model_id or "")
    target = replace(
        known,
        repo=options.hub_model_id or known.repo,
        private=options.hub_private_repo or known.private,
        revision=options.hub_revision or known.revision,
        strategy=options.hub_strategy or known.strategy,
    )
    if not target.repo:
        raise ValueError(f"{str(run)!r} was not trained with `push_to_hub`: say where to, --hub_model_id USER/NAME.")
    check_repo(target.repo)
    return target


def push_run(run: Path, target: Target) -> int:
    """Everything that the folder holds and the strategy publishes, then whatever waited before it."""
    if Target.read(run) is None:
        target.write(run)
    parts = outbox.state_of(run, target.strategy)
    if not any(parts.values()):
        raise ValueError(f"There is nothing in {str(run)!r} to push.")
    try:
        outbox.stage(run, parts, f"Push of {run.absolute().name}", target)
    except OSError as error:
        print(f"The newest state could not be kept ({error}); what waits goes first.", file=sys.stderr)
    while outbox.missing(run):  # each save by itself, where `hub_always_push` wants every one
        outcome = patiently(lambda: upload.attempt(run, target))
        if not outcome.ok:
            left = outbox.missing(run)
            print(f"NOT on the Hub, in {outcome.repo or target.repo}: {', '.join(left)}. {outcome.error}. It is kept; "
                  "the same command goes on.", file=sys.stderr)  # fmt: skip
            return 1
        print(f"On the Hub: {', '.join(dict.fromkeys(outcome.messages))}, {outcome.files} files: {outcome.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
