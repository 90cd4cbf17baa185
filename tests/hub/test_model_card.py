"""What the card of a run says."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hub_server import problems_of
from material import MATERIAL
from tiny import tiny_dataset

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS
from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.hub.card_blocks import join, split
from opefo_trl.hub.model_card import RunFacts, RunSummary, describe_base, write_card
from opefo_trl.playground import MODEL, playground_dataset

RESULTS = json.loads((MATERIAL / "results.json").read_text())

LICENCED = {"license": "other", "license_name": "qwen", "base_model": "Qwen/Qwen3-0.6B"}


@pytest.fixture
def summary(out):
    return RunSummary(
        args=OPEFOConfig(str(out), use_cpu=True, bf16=False, report_to=[], learning_rate=0.125, hub_token="hf_secret"),
        facts=RunFacts(),
        name="model",
        repo="alice/model",
        base_model=str(MODEL),
        adapter=False,
        steps=(2, 4),
        rewards=["digits"],
        curves=pd.DataFrame({"step": [1, 2], "entropy": [1.5, 1.25], "reward": [0.0, 1.0]}),
        paper=OPEFOTrainer._paper,
        tags=["opefo", "mine"],
        dataset=playground_dataset(),
    )


def write(summary):
    write_card(summary)
    text = Path(summary.args.output_dir, "README.md").read_text()
    assert problems_of(text) == []
    return *split(text), text


def test_the_card_of_a_run(summary, out):
    out.mkdir()
    (out / "entropy_curves.png").write_bytes(b"picture")
    metadata, body, text = write(summary)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation" and {"mine", "opefo"} <= set(metadata["tags"])
    assert "base_model" not in metadata and "the playground's model" in body and str(MODEL) not in text
    assert 'model="alice/model"' in body and 'EntropyCurves.load("alice/model")' in body
    assert "](entropy_curves.png)" in body and "report.html" not in body
    assert "| entropy, nats per token | 1.500 | 1.250 |" in body  # as train.py prints it
    assert "| optimizer steps | 2 of 4 |" in body and "learning_rate=0.125," in body and "`digits`" in body
    assert "opefo_trl 0" in body and "transformers " in body
    assert "{%" not in text and "hf_secret" not in text and "\n\n\n" not in text and "|\n\n|" not in body
    assert "None" not in body.split("### Reproduce it")[0].replace("`None`", "")
    (out / "README.md").write_text(text + "\n## Afterword\n\nBy hand.\n")
    _, body, _ = write(replace(summary, steps=(4, 4)))
    assert "By hand." in body and body.count("## Training") == 1 and "4 of 4" in body


def write_results(out):
    """Write results of the weights that are in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").write_bytes(b"weights")
    settings = {**RESULTS["settings"], "weights": ModelSource(str(out)).fingerprint()}
    (out / "eval").mkdir()
    (out / "eval" / "results.json").write_text(json.dumps({**RESULTS, "settings": settings}))


def test_results_and_a_recipe_are_in_it(summary, out, tmp_path):
    write_results(out)
    (tmp_path / "recipe.yaml").write_text(
        "hub_token: abcdef\nenv:\n  WANDB_API_KEY: abcd\n\n  OTHER: {x: abcde}\n# Größe\nseed: 1\n", encoding="utf-8"
    )
    facts = RunFacts("openai/gsm8k", True, tmp_path / "recipe.yaml")
    metadata, body, text = write(replace(summary, facts=facts))
    assert metadata["datasets"] == ["openai/gsm8k"] and "(https://huggingface.co/datasets/openai/gsm8k)" in body
    assert "AIME 2024" in body and len(metadata["model-index"][0]["results"]) == 2
    assert body.index("## Evaluation") < body.index("## Training")
    assert "recipe.yaml" in body and "# Größe\nseed: 1" in body and "abcd" not in text and "env:" not in text


def test_results_of_other_weights_leave_it(summary, out):
    write_results(out)
    assert "AIME 2024" in write(summary)[1]
    metadata, body = split((out / "README.md").read_text())
    metadata["model-index"].append(
        {"name": "by hand", "results": [{"task": {"type": "x"}, "dataset": {"type": "t", "name": "n"}, "metrics": []}]}
    )
    metadata["model-index"][-1]["results"][0]["metrics"] = [{"type": "accuracy", "value": 1}]
    (out / "README.md").write_text(join(metadata, body))
    (out / "model.safetensors").write_bytes(b"trained further")
    metadata, body, _ = write(summary)
    assert "AIME 2024" not in body and "of other weights" in body
    assert [model["name"] for model in metadata["model-index"]] == ["by hand"]


def test_an_adapter_is_called_one(summary, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(join({"base_model": "Qwen/Qwen3-0.6B", "license": "mit"}, ""))
    metadata, body, _ = write(replace(summary, adapter=True, base_model=str(tmp_path / "base")))
    assert metadata["library_name"] == "peft" and metadata["base_model_relation"] == "adapter"
    assert metadata["base_model"] == "Qwen/Qwen3-0.6B" and metadata["license"] == "mit"
    assert "A LoRA adapter for a local model, `base`, itself from [Qwen/Qwen3-0.6B](https://" in body


def test_data_and_prompts_are_those_that_were_trained_on(summary):
    metadata, body, _ = write(replace(summary, base_model="", repo=None, curves=None, dataset=None))
    assert "a model of the user's own" in body and "data of its author's own" in body
    assert metadata.keys().isdisjoint({"base_model", "base_model_relation", "datasets", "license"})
    assert '[{"role": "user", "content": "' in write(summary)[1]
    assert 'generator("What is the sum' in write(replace(summary, dataset=tiny_dataset(), base_model="a/b"))[1]
    files = {"hf://datasets/openai/gsm8k@e53f/main/train.parquet": {}, "https://elsewhere/x": {}}
    dataset = SimpleNamespace(info=SimpleNamespace(download_checksums=files))  # as a `Dataset` remembers
    assert write(replace(summary, dataset=dataset))[0]["datasets"] == ["openai/gsm8k"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of controls that do nothing strictly on-policy
@pytest.mark.parametrize("control", list(CONTROLS))
def test_each_control_is_named_for_what_it_is(summary, control):
    args = OPEFOConfig(summary.args.output_dir, use_cpu=True, bf16=False, report_to=[], control=control)
    _, body, _ = write(replace(summary, args=args))
    named = f"the entropy control `{control}`" in body
    assert named == (control not in ("opefo", "none")) and ("trained with OPEFO" in body) == (control == "opefo")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, {}),
        ("---\n: [\n---\n", {}),
        (join({"base_model": "/data/llama"}, ""), {}),
        (join({"base_model": ["Qwen/Qwen3-0.6B"]}, ""), {"base_model": "Qwen/Qwen3-0.6B"}),
        (join(LICENCED, ""), LICENCED),
    ],
)
def test_where_a_model_comes_from(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert describe_base(str(tmp_path)) == expected
    assert describe_base("Qwen/Qwen3-0.6B") == {"base_model": "Qwen/Qwen3-0.6B"}
    assert describe_base(str(MODEL)) == {"license": "apache-2.0"}
    assert describe_base("/tmp/merged-and-gone") == describe_base("") == {}
