"""Results of eval.py, to the repository of the model that they are of."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_token, is_offline_mode

from opefo_trl.evaluation.results import read_results
from opefo_trl.files import write_whole
from opefo_trl.hub.model_card import with_results
from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import NotPushedError
from opefo_trl.hub.upload import CARD, CARDS, check_repo, patiently, push, set_timeouts
from opefo_trl.repositories import is_repository


def results_target(model: str, repo: str | None, private: bool | None) -> Target:
    """Where results go: what was named, or the repository of the model's run, or of the model."""
    folder = Path(model)
    known = (Target.read(folder) or Target.read(folder.parent)) if folder.is_dir() else None
    if repo is None and known is None and not is_repository(model):
        raise ValueError(f"It is not known where on the Hub {model!r} lies: say --hub_model_id USER/NAME.")
    revision = known.revision if known and repo in (None, known.repo) else None
    return Target(repo or (known.repo if known else model), private, revision)


def check_target(target: Target) -> None:
    """Before hours of sampling: what would keep the results from getting there."""
    check_repo(target.repo)
    if is_offline_mode():
        raise ValueError("`push_to_hub=True`, and HF_HUB_OFFLINE is set: nothing could be sent.")
    if get_token() is None:
        raise ValueError("`push_to_hub=True`, and there is no token: log in with `hf auth login`, or set HF_TOKEN.")
    set_timeouts()
    outcome = push(target, {}, "")  # the repository is made, if it has to be
    if outcome.refused:
        raise ValueError(f"The results could not be pushed to {target.repo!r}: {outcome.error}.")


def push_results(target: Target, folder: Path, model: str) -> str:
    """
    `results.json`, its table and the samples into `eval/`, and the scores into the card, its body and its metadata. Of
    a checkpoint they lie in `eval/checkpoint-N/`, and leave the card alone.
    """
    set_timeouts()
    results = read_results(folder)
    of_run = Target.read(Path(model)) is not None
    model_is_checkpoint = not of_run and Target.read(Path(model).parent) is not None
    place = f"eval/{Path(model).name}" if model_is_checkpoint else "eval"
    files = {f"{place}/{path.name}": path for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.md"))}
    files |= {f"{place}/samples/{path.name}": path for path in sorted((folder / "samples").glob("*.parquet"))}
    name, own = target.repo.split("/")[-1], Path(model) / CARD
    if of_run and own.is_file():  # any other folder stays as it is
        text = with_results(own.read_text(), results, name)
        write_whole(own, lambda part: part.write_text(text))
        files[CARD] = own
    titles = ", ".join(scores["title"] for scores in results["benchmarks"].values())
    cards = Path(model) / CARDS if of_run else None
    change = None if model_is_checkpoint else lambda text: with_results(text, results, name)
    outcome = patiently(lambda: push(target, files, f"Evaluation: {titles}", change, cards))
    if not outcome.ok:
        raise NotPushedError(
            f"NOT on the Hub: the results of {titles}. {outcome.error}. They are in {folder}; the same command pushes "
            "them without sampling again."
        )
    return f"On the Hub: {outcome.files} files, {outcome.url}"
