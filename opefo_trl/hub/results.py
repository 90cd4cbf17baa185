"""Results of eval.py in the repository of their model: files, and scores in the card's body and metadata."""

from pathlib import Path
from typing import Any

from jinja2 import Template

from opefo_trl.data.benchmarks import BENCHMARKS
from opefo_trl.evaluation.results import HEAD, markdown, read_results, rows_of
from opefo_trl.files import CARD_FILE, EVAL_FOLDER, RESULTS_TABLE_FILE, write_whole
from opefo_trl.hub.card_blocks import join, merge
from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import NotPushedError
from opefo_trl.hub.upload import LONGEST_WAIT, UploadError, push
from opefo_trl.repositories import check_repo_id, is_repository

_DECODING = ("revision", "temperature", "top_p", "max_new_tokens", "seed", "limit", "prompt_template")


def results_target(model: str, repo: str | None, private: bool | None) -> Target:
    """Return where results go: to the named repository, or that of the model's run, or of the model itself."""
    run = Target.read(Path(model)) or Target.read(Path(model).parent)
    if repo is None and run is None and not is_repository(model):
        raise ValueError(f"The repository of {model!r} on the Hub is not known. Set --hub_model_id USER/NAME.")
    revision = run.revision if run and repo in (None, run.repo) else None
    return Target(repo or (run.repo if run else model), private, revision)


def check_target(target: Target) -> None:
    """Check before hours of sampling that results can be pushed; the repository is created if need be."""
    check_repo_id(target.repo)
    try:
        push(target, {}, "")
    except UploadError as error:
        if error.wait > LONGEST_WAIT:
            raise ValueError(f"`push_to_hub=True`, but nothing can be pushed to {target.repo!r}: {error}.") from None


def push_results(target: Target, folder: Path, model: str) -> str:
    """Push the results, samples and scores in `folder`; those of a checkpoint leave the card alone."""
    results, run = read_results(folder), Path(model)
    of_run = Target.read(run) is not None
    of_checkpoint = not of_run and Target.read(run.parent) is not None
    place = f"{EVAL_FOLDER}/{run.name}" if of_checkpoint else EVAL_FOLDER
    paths = sorted(path for glob in ("*.json", RESULTS_TABLE_FILE, "samples/*.parquet") for path in folder.glob(glob))
    files = {f"{place}/{path.relative_to(folder).as_posix()}": path for path in paths}
    if not of_checkpoint:
        card = files[CARD_FILE] = run / CARD_FILE if of_run else folder / "card.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        text = with_results(before, results, target.repo.split("/")[-1])
        write_whole(card, lambda part: part.write_text(text, encoding="utf-8"))
    titles = ", ".join(scores["title"] for scores in results["benchmarks"].values())
    try:
        _, commit = push(target, files, f"Evaluation: {titles}")
    except UploadError as error:
        later = f"They are in {folder}; the same command pushes them without sampling again."
        raise NotPushedError(f"NOT on the Hub: the results of {titles}. The reason: {error}. {later}") from None
    return f"On the Hub: {len(files)} files, {commit.commit_url if commit else target.repo}"


def with_results(card: str, results: dict[str, Any], model: str) -> str:
    """Return a card with the results of eval.py in its body and its metadata; without any, those there are go."""
    settings = results["settings"]
    decoding = ", ".join(f"{key} {settings[key]}" for key in _DECODING if settings.get(key) is not None)
    template = Template(Path(__file__).with_name("evaluation_template.md").read_text(encoding="utf-8"))
    table = markdown(HEAD, rows_of(results["benchmarks"])) if results["benchmarks"] else None
    text = template.render(table=table, settings=settings, decoding=decoding)
    measured = [_result(name, scores, settings) for name, scores in results["benchmarks"].items()]
    return merge(join({"model-index": [{"name": model, "results": measured}] if measured else None}, text), card)


def _result(name: str, scores: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of a `model-index`: avg@k in per cent and, with several samples, pass@k."""
    k, source = scores["k"], BENCHMARKS[name].sources[0] if name in BENCHMARKS else None
    data = {"name": scores["title"], "type": source.hub if source else name}
    if source is not None:
        data |= {"split": source.split} | ({"config": source.configs[0]} if source.configs else {})
    shown = (*_DECODING, "engine", "grader", "policy") if source else (*_DECODING[:-1], "engine")  # a task's own
    args = {"k": k, **{key: settings[key] for key in shown if settings.get(key) is not None}}
    interval = {"interval_95": [round(100 * side, 2) for side in scores["interval"]], "problems": scores["problems"]}
    values = [("accuracy", "avg", scores["avg"], {**interval, **args})]
    values += [("pass_at_k", "pass", scores["pass"][str(k)], args)] if k > 1 else []
    metrics = [
        {"type": kind, "name": f"{name}@{k}", "value": round(100 * value, 2), "args": args}
        for kind, name, value, args in values
    ]
    return {"task": {"type": "text-generation", "name": "Mathematical reasoning"}, "dataset": data, "metrics": metrics}
