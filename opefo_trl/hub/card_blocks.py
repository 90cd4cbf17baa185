"""A model card that the run and its author both write: generated text stands between marks, the rest is the author's.

<!-- opefo_trl: training -->
generated, and replaced as a whole by the next push
<!-- /opefo_trl: training -->
"""

import re
from contextlib import suppress
from typing import Any

import yaml
from huggingface_hub import ModelCard, get_token
from huggingface_hub.repocard import REGEX_YAML_BLOCK

LICENCE = ("license", "license_name", "license_link")
_BLOCK = re.compile(r"<!-- opefo_trl: (?P<name>[a-z]+) -->.*?<!-- /opefo_trl: (?P=name) -->", re.DOTALL)
_OUTDATED = "are of other weights than these"  # as evaluation_template.md says it
_OWN_KEYS = ("base_model", "base_model_relation", "datasets", "library_name")  # the run knows better than anyone


def split(text: str) -> tuple[dict[str, Any], str]:
    """Return the metadata and the body of a card."""
    match = REGEX_YAML_BLOCK.search(text)
    try:
        metadata = yaml.safe_load(match[2]) or {} if match else {}
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata is not YAML: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError("its metadata, between the lines ---, is not a map")
    return metadata, text[match.end() :] if match else text


def join(metadata: dict[str, Any], body: str) -> str:
    """Return a card; keys without a value are left out."""
    metadata = {key: value for key, value in metadata.items() if value not in (None, [])}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"


def merge(new: str, old: str) -> str:
    """Return the card `old` with the blocks and the metadata of `new`, and with text of the author's that it lacks."""
    (metadata, text), (kept, body) = split(new), split(old)
    previous = ""
    for match in _BLOCK.finditer(text):
        existing = [found[0] for found in _BLOCK.finditer(body) if found["name"] == match["name"]]
        if existing:
            body = body.replace(existing[0], match[0])
        elif previous:  # after the block that it follows in `new`
            body = body.replace(previous, f"{previous}\n\n{match[0]}")
        else:  # before the training, where the card tells of one
            begin, mark, end = body.partition("<!-- opefo_trl: training -->")
            body = f"{begin.rstrip()}\n\n{match[0]}\n\n{mark}{end}"
        previous = match[0]
    for own in _BLOCK.sub("\0", text).split("\0"):
        body += "" if own.strip() in body else f"\n\n{own.strip()}"
    merged = {**metadata, **kept, **{key: metadata[key] for key in _OWN_KEYS if key in metadata}}
    tags = [[value] if isinstance(value, str) else value or [] for value in (kept.get("tags"), metadata.get("tags"))]
    merged["tags"] = list(dict.fromkeys(tags[0] + tags[1]))
    merged["model-index"] = _merge_results(metadata, kept, _OUTDATED in text)
    return join(merged, body)


def _merge_results(metadata: dict[str, Any], kept_metadata: dict[str, Any], outdated: bool) -> list[Any]:
    """Return the results of both; the first replace those of the same data and metric; `outdated` drops eval.py's."""
    new, old = (part.get("model-index") or [] for part in (metadata, kept_metadata))

    def measures(result: dict[str, Any]) -> list[Any]:
        data = [result["dataset"].get(key) for key in ("type", "name", "config", "split", "revision")]
        return [[*data, metric.get("type"), metric.get("name")] for metric in result["metrics"]]

    replaced = [measure for model in new for result in model["results"] for measure in measures(result)]
    for model in old:
        kept = [result for result in model["results"] if any(measure not in replaced for measure in measures(result))]
        model["results"] = [result for result in kept if not (outdated and "'engine':" in str(result["metrics"]))]
    return [*(model for model in old if model["results"]), *new]


def card_to_push(local: str, repo: str, hub_card: str | None) -> str:
    """Return the card to commit: the Hub's, if there is one, with what is new in `local`; for its repository."""
    text = local if hub_card is None else merge(local, hub_card)
    text = _BLOCK.sub(lambda match: re.sub(r'(\bmodel=|EntropyCurves\.load\()"[^"]*"', rf'\1"{repo}"', match[0]), text)
    metadata, body = split(text)
    if isinstance(metadata.get("base_model"), str) and "license" not in metadata:
        with suppress(Exception):  # the base model's card cannot be had or read: ours names no licence
            base = ModelCard.load(metadata["base_model"], token=get_token(), ignore_metadata_errors=True)
            metadata |= {key: value for key, value in base.data.to_dict().items() if key in LICENCE}
    return join(metadata, body)
