"""A card that two write: generated blocks are replaced as wholes, and what somebody wrote around them stays."""

import yaml

from opefo_trl.hub.card_blocks import card_to_push, join, merge, split


def card(body="", **metadata):
    return join(metadata, body)


def block(name, text):
    return f"<!-- opefo_trl: {name} -->\n{text}\n<!-- /opefo_trl: {name} -->"


def test_generated_blocks_are_replaced_and_everything_else_stays():
    old = card(f"# Mine\n\nwords\n\n{block('model', 'old')}\n\n## Note\n\nby hand\n\n{block('citation', 'old')}\n")
    new = card(f"{block('model', 'new')}\n\n{block('entropy', 'fresh')}\n\n{block('citation', 'new')}\n")
    _, body = split(merge(new, old))
    places = [body.index(text) for text in ("# Mine", "words", "new", "fresh", "## Note", "by hand", "citation")]
    assert places == sorted(places) and "old" not in body
    assert merge(new, merge(new, old)) == merge(new, old)
    without_marks = merge(new, card("# Theirs\n\nText.\n"))
    assert without_marks.index("# Theirs") < without_marks.index("new")
    assert "scores" in merge(new, card(block("evaluation", "scores")))  # which the new card lacks


def test_words_of_both_sides_stay_and_none_twice():
    code = "```\na\n\nb\n```"
    ours = card(f"{block('model', 'new')}\n\nlocal words\n\n{code}\n\n{block('citation', 'c')}")
    merged = theirs = card(f"{block('model', 'old')}\n\nwords on the Hub\n")
    for _ in range(3):
        merged = merge(ours, merged)
    assert merged.count("local words") == merged.count("words on the Hub") == merged.count(code) == 1
    assert "old" in theirs and "old" not in merged


def test_metadata_of_both():
    new = card(license="mit", tags=["opefo", "trl"], base_model="b/new", library_name="transformers", datasets=["d/e"])
    old = card(license="llama3.1", language="en", tags=["mine", "trl"], base_model="a/old", custom={"a": 1})
    metadata, _ = split(merge(new, old))
    assert metadata["license"] == "llama3.1" and metadata["language"] == "en" and metadata["custom"] == {"a": 1}
    assert metadata["tags"] == ["mine", "trl", "opefo"] and metadata["base_model"] == "b/new"
    assert metadata["datasets"] == ["d/e"] and metadata["library_name"] == "transformers"
    assert split(merge(new, card(tags="mine")))[0]["tags"] == ["mine", "opefo", "trl"]


def test_results_replace_those_of_the_same_data_and_metric_only():
    def results(**values):
        entries = [
            {"dataset": {"type": key[0]}, "metrics": [{"type": key[2:], "value": value}]}
            for key, value in values.items()
        ]
        return {"model-index": [{"name": "m", "results": entries}]}

    old = results(a_accuracy=1, a_pass=9, b_accuracy=3)
    old["model-index"][0]["results"][1]["source"] = {"url": "https://elsewhere"}
    metadata, _ = split(merge(card(**results(a_accuracy=2, c_accuracy=5)), card(**old)))
    entries = [entry for model in metadata["model-index"] for entry in model["results"]]
    values = {
        (entry["dataset"]["type"], entry["metrics"][0]["type"]): entry["metrics"][0]["value"] for entry in entries
    }
    assert values == {("a", "accuracy"): 2, ("a", "pass"): 9, ("b", "accuracy"): 3, ("c", "accuracy"): 5}
    assert entries[0]["source"] == {"url": "https://elsewhere"}  # what only its author knows the meaning of


def test_snippets_load_from_the_repository():
    text = block("model", 'pipeline("text-generation", model="out/x")\nEntropyCurves.load("out/x")') + '\nmodel="keep"'
    pushed = card_to_push(card(text), "alice/x", None)
    assert pushed.count('"alice/x"') == 2 and "out/x" not in pushed and 'model="keep"' in pushed
    assert card_to_push(pushed, "alice/x", pushed) == pushed


def test_split_and_join_are_inverse():
    metadata = {"license": "mit", "tags": ["ä", "b"], "nothing": None}
    assert split(join(metadata, "# Body\n")) == ({"license": "mit", "tags": ["ä", "b"]}, "\n# Body\n")
    assert split("# No metadata") == ({}, "# No metadata") and yaml.safe_load(join({}, "").split("---")[1]) == {}
