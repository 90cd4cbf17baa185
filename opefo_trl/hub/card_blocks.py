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

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

OPEN, CLOSE = "<!-- opefo_trl: {} -->", "<!-- /opefo_trl: {} -->"
BLOCK = re.compile(r"<!-- opefo_trl: (?P<name>[a-z]+) -->.*?<!-- /opefo_trl: (?P=name) -->", re.DOTALL)
NOTHING = "---\n{}\n---\n"
OURS = ("base_model", "base_model_relation", "datasets", "library_name")


@dataclass(frozen=True)
class Chunk:
    text: str
    name: str | None = None  # of a generated block; None is somebody's own words


def chunks(text: str) -> list[Chunk]:
    """The body of a card in its parts: generated blocks, and somebody's own paragraphs."""
    found, end = [], 0
    for match in BLOCK.finditer(text):
        found += [*paragraphs(text[end : match.start()]), Chunk(match[0], match["name"])]
        end = match.end()
    return [*found, *paragraphs(text[end:])]


def paragraphs(text: str) -> list[Chunk]:
    """Between blank lines; code between fences stays whole."""
    parts: list[list[str]] = [[]]
    fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        if line.strip() or fenced:
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return [Chunk("\n".join(lines)) for lines in parts if lines]


def block(name: str, text: str) -> str:
    return f"{OPEN.format(name)}\n{text.strip()}\n{CLOSE.format(name)}"


def addressed(text: str, repo: str) -> str:
    """A card whose generated snippets load from the repository that it lies in, whatever it was written with."""
    return BLOCK.sub(lambda match: re.sub(r'(\bmodel=|EntropyCurves\.load\()"[^"]*"', rf'\1"{repo}"', match[0]), text)


def merge(new: str, before: str, last: str | None = None) -> str:
    """
    The card `new` with all that somebody has written into `before`. `last` is `new` as it was when the two met last:
    what is in it and in one of them only, was taken out of the other on purpose.
    """
    ours, theirs = ModelCard(new, ignore_metadata_errors=True), ModelCard(before, ignore_metadata_errors=True)
    known = ModelCard(last or NOTHING, ignore_metadata_errors=True)
    body = merge_bodies(chunks(ours.text), chunks(theirs.text), chunks(known.text))
    there = _raw_metadata(before)
    theirs.data["tags"] = _as_list(there.get("tags"))  # which huggingface_hub takes apart, if it is one word
    metadata = merge_metadata(ours.data.__dict__, theirs.data.__dict__, known.data.__dict__)
    index = there.get("model-index")
    if index and theirs.data.get("eval_results") is None:  # what its classes do not read stays as it is
        name, results = metadata.get("model_name") or "model", metadata.get("eval_results")
        index = [*_others(index, results or []), *(eval_results_to_model_index(name, results) if results else [])]
        metadata.update({"model-index": index, "eval_results": None})
    theirs.data.__dict__.clear()
    theirs.data.__dict__.update(metadata)
    theirs.text = "\n" + "\n\n".join(chunk.text for chunk in body) + "\n"
    return str(theirs)


def merge_bodies(new: list[Chunk], before: list[Chunk], last: list[Chunk]) -> list[Chunk]:
    """`before` with its generated blocks as they are in `new`; what only `new` has follows what it follows there."""
    fresh = {chunk.name: chunk for chunk in new if chunk.name}
    gone = {chunk for chunk in last if not chunk.name} - set(new)
    result = [fresh.get(chunk.name, chunk) if chunk.name else chunk for chunk in before if chunk not in gone]
    names = {chunk.name for chunk in before if chunk.name}
    for index, chunk in enumerate(new):
        if chunk.name in names if chunk.name else (chunk in before or chunk in last):
            continue
        place = len(result)
        for previous in reversed(new[:index]):
            if previous in result:
                place = result.index(previous) + 1
                break
        result.insert(place, chunk)
    return result


def merge_metadata(new: dict[str, Any], before: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """As attributes of huggingface_hub's `ModelCardData`."""
    merged = {}
    for key in [*before, *(key for key in new if key not in before)]:
        ours, theirs = new.get(key), before.get(key)
        by_hand = theirs is not None and not (key in last and last[key] == theirs)
        ours_counts = ours is not None if key in OURS else not by_hand
        merged[key] = ours if ours_counts else theirs
    merged["tags"] = list(dict.fromkeys([*_as_list(before.get("tags")), *_as_list(new.get("tags"))])) or None
    merged["eval_results"] = merge_results(new.get("eval_results") or [], before.get("eval_results") or []) or None
    return merged


def _as_list(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or [])


def _others(index: list[Any], results: list[EvalResult]) -> list[Any]:
    """Entries of a `model-index` that are not of the same measures as `results`, as far as they can be read."""
    measured, kept = {_measure(result) for result in results}, []
    for entry in index:
        try:
            _, found = model_index_to_eval_results([entry])
            same = bool(found) and measured.issuperset(_measure(result) for result in found)
        except (KeyError, TypeError, AttributeError):
            same = False
        kept += [] if same else [entry]
    return kept


def _raw_metadata(text: str) -> dict[str, Any]:
    match = REGEX_YAML_BLOCK.search(text)
    return (yaml.safe_load(match[2]) or {}) if match else {}


def merge_results(new: list[EvalResult], before: list[EvalResult]) -> list[EvalResult]:
    measured = {_measure(result) for result in new}
    return [*(result for result in before if _measure(result) not in measured), *new]


def _measure(result: EvalResult) -> tuple[Any, ...]:
    return result.unique_identifier, result.dataset_name, result.metric_type, result.metric_name
