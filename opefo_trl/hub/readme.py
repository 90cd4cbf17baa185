"""A model card that two write: what is generated stands between marks, and all around it is somebody's own.

    <!-- opefo_trl: training -->
    generated, and replaced by the next push
    <!-- /opefo_trl: training -->

Of the metadata, what somebody has set by hand stays, except for what a run knows better: the base model, the data, the
library. Tags are joined; evaluation results replace those of the same data and metric.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard

OPEN, CLOSE = "<!-- opefo_trl: {} -->", "<!-- /opefo_trl: {} -->"
BLOCK = re.compile(r"<!-- opefo_trl: (?P<name>[a-z]+) -->.*?<!-- /opefo_trl: (?P=name) -->", re.DOTALL)
OURS = ("base_model", "base_model_relation", "datasets", "library_name")


@dataclass(frozen=True)
class Chunk:
    text: str
    name: str | None = None  # of a generated block; None is somebody's own words


def chunks(text: str) -> list[Chunk]:
    """The body of a card in its parts; what is only blank is left out."""
    found, end = [], 0
    for match in BLOCK.finditer(text):
        found += [Chunk(text[end : match.start()].strip("\n")), Chunk(match[0], match["name"])]
        end = match.end()
    found.append(Chunk(text[end:].strip("\n")))
    return [chunk for chunk in found if chunk.text.strip()]


def block(name: str, text: str) -> str:
    return f"{OPEN.format(name)}\n{text.strip()}\n{CLOSE.format(name)}"


def addressed(text: str, repo: str) -> str:
    """A card whose generated snippets load from the repository that it lies in, whatever it was written with."""
    return BLOCK.sub(lambda match: re.sub(r'(\bmodel=|EntropyCurves\.load\()"[^"]*"', rf'\1"{repo}"', match[0]), text)


def merge(new: str, before: str, pushed: str | None = None) -> str:
    """
    The card `new` with all that somebody has written into `before`. Where `before` is still what was `pushed` last,
    nobody has: what was written since, or taken out, is in `new`.
    """
    fresh, old = ModelCard(new, ignore_metadata_errors=True), ModelCard(before, ignore_metadata_errors=True)
    ours, theirs = chunks(fresh.text), chunks(old.text)
    if before == pushed:
        fresh_blocks = {chunk.name: chunk for chunk in ours if chunk.name}
        body = merge_bodies([fresh_blocks.get(chunk.name, chunk) for chunk in theirs if chunk.name], ours)
        metadata = merge_metadata(fresh.data.__dict__, old.data.__dict__, fresh.data.__dict__)
    else:
        body = merge_bodies(ours, theirs)
        metadata = merge_metadata(fresh.data.__dict__, old.data.__dict__, old.data.__dict__)
    old.data.__dict__.update(metadata)
    old.text = "\n" + "\n\n".join(chunk.text for chunk in body) + "\n"
    return str(old)


def merge_bodies(new: list[Chunk], before: list[Chunk]) -> list[Chunk]:
    """`before` with its generated blocks as they are in `new`; what only `new` has follows what it follows there."""
    fresh = {chunk.name: chunk for chunk in new if chunk.name}
    result = [fresh.get(chunk.name, chunk) if chunk.name else chunk for chunk in before]
    names, words = {chunk.name for chunk in before if chunk.name}, "\n\n".join(chunk.text for chunk in before)
    for index, chunk in enumerate(new):
        if chunk.name in names or (chunk.name is None and chunk.text.strip() in words):
            continue
        place = len(result)
        for previous in reversed(new[:index]):
            if previous in result:
                place = result.index(previous) + 1
                break
        result.insert(place, chunk)
    return result


def merge_metadata(new: dict[str, Any], before: dict[str, Any], by_hand: dict[str, Any]) -> dict[str, Any]:
    """As attributes of huggingface_hub's `ModelCardData`; `by_hand` is the one of the two that somebody has set."""
    other = before if by_hand is new else new
    merged = {**_known(other), **_known(by_hand), **{key: new[key] for key in OURS if new.get(key) is not None}}
    merged["tags"] = list(dict.fromkeys([*(before.get("tags") or []), *(new.get("tags") or [])])) or None
    merged["eval_results"] = merge_results(new.get("eval_results") or [], before.get("eval_results") or []) or None
    return merged


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if value is not None}


def merge_results(new: list[EvalResult], before: list[EvalResult]) -> list[EvalResult]:
    measured = {_measure(result) for result in new}
    return [*(result for result in before if _measure(result) not in measured), *new]


def _measure(result: EvalResult) -> tuple[Any, ...]:
    return result.unique_identifier, result.dataset_name, result.metric_type, result.metric_name
