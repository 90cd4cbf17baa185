"""opefo-trl hub push OUT: push what of a run is not on the Hub."""

import argparse
from dataclasses import replace
from pathlib import Path

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.hub.outbox import Target, files_to_publish
from opefo_trl.hub.publisher import NotPushedError, Publisher
from opefo_trl.repositories import check_repo_id


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="opefo-trl hub", description="Push a run to the Hub. Page: docs/release.md")
    command = parser.add_subparsers(required=True).add_parser("push", help="push one", description=parser.description)
    command.add_argument("run", type=Path, metavar="OUT", help="the run's output folder")
    command.add_argument("--hub_model_id", dest="repo", help="repository (default: the one that the run was given)")
    command.add_argument("--hub_private_repo", dest="private", action="store_true", default=None, help="if created")
    command.add_argument("--hub_revision", dest="revision", help="branch to commit to")
    strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
    command.add_argument("--hub_strategy", dest="strategy", choices=strategies, help="which checkpoints to push")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    run = options.pop("run")
    target = replace(Target.read(run) or Target(""), **options)
    try:
        if not files_to_publish(run, checkpoints(run), target.strategy):
            raise ValueError(f"There is nothing in {str(run)!r} to push. Give the `output_dir` of a run.")
        if not target.repo:
            raise ValueError(f"{str(run)!r} was not trained with `push_to_hub`. Set --hub_model_id USER/NAME.")
        check_repo_id(target.repo)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    publisher = Publisher(run, target)
    publisher.stage(checkpoints(run), f"Push of {run.absolute().name}")
    try:
        print(f"Pushed: {publisher.finish().commit_url}\n{publisher.report()}")
    except NotPushedError as error:
        parser.exit(1, f"{publisher.report()}\n{error}\n")
    finally:
        publisher.stop()


if __name__ == "__main__":
    main()
