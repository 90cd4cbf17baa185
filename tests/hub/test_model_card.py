"""What a card says, and that what somebody has written into it stays."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import problems_of
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig
from tiny import tiny_dataset, train
from transformers import AutoModelForCausalLM

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS
from opefo_trl.hub.card_blocks import addressed, block, merge
from opefo_trl.hub.model_card import (
    Base,
    RunFacts,
    _sources,
    command_of,
    method_of,
    results_of,
    with_results,
    without_secrets,
)
from opefo_trl.playground import MODEL

RESULTS = {
    "model": "m",
    "settings": {
        **{"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 512, "seed": 0, "prompt_template": "boxed"},
        **{"limit": None, "engine": "vllm 0.31", "grader": "math-verify 0.9", "policy": "lenient"},
    },
    "benchmarks": {
        "aime24": {
            **{"title": "AIME 2024", "problems": 30, "k": 32, "avg": 0.125, "standard_error": 0.03},
            **{"interval": [0.07, 0.19], "pass": {"1": 0.125, "32": 0.4}, "majority": 0.2, "truncated": 0.1},
            "outcomes": {"correct": 120, "wrong": 800, "no_answer": 40, "timeout": 0, "error": 0},
            **{"tokens": 300.0, "entropy": 0.4, "calibration": 0.1},
        },
        "playground": {
            **{"title": "playground", "problems": 18, "k": 1, "avg": 0.5, "standard_error": 0.1},
            **{"interval": [0.3, 0.7], "pass": {"1": 0.5}, "majority": 0.5, "truncated": 0.0},
            "outcomes": {"correct": 9, "wrong": 9, "no_answer": 0, "timeout": 0, "error": 0},
            **{"tokens": 6.0, "entropy": None, "calibration": None},
        },
    },
}


def card(body="", **metadata):
    return f"---\n{yaml.safe_dump(metadata)}---\n{body}"


# ---- two writers


def test_generated_blocks_are_replaced_and_everything_else_stays():
    before = card(f"# Mine\n\nwords\n\n{block('model', 'old')}\n\n## Note\n\nby hand\n\n{block('citation', 'old')}\n")
    new = card(f"{block('model', 'new')}\n\n{block('entropy', 'fresh')}\n\n{block('citation', 'new')}\n")
    body = ModelCard(merge(new, before)).text
    places = [body.index(part) for part in ("# Mine", "words", "new", "fresh", "## Note", "by hand", "citation")]
    assert places == sorted(places) and "old" not in body
    assert merge(new, merge(new, before)) == merge(new, before)


def test_a_card_without_marks_keeps_its_words_before_ours():
    merged = ModelCard(merge(card(block("model", "ours")), card("# Theirs\n\nText.\n"))).text
    assert merged.index("# Theirs") < merged.index("ours")


def test_words_of_both_sides_stay_and_none_twice():
    ours = card(f"{block('model', 'new')}\n\nlocal words\n")
    theirs = card(f"{block('model', 'old')}\n\nwords on the Hub\n")
    merged = merge(ours, theirs)
    assert "local words" in merged and "words on the Hub" in merged and "old" not in merged
    assert merge(ours, merged).count("local words") == 1


def test_where_nobody_wrote_on_the_hub_the_local_words_count():
    body = f"{block('model', 'a')}\n\nfirst words\n\n{block('evaluation', 'b')}\n\n{block('citation', 'c')}\n"
    pushed = card(body, license="mit")
    mine = card(f"{block('model', 'A')}\n\nbetter words\n\n{block('citation', 'C')}\n", license="other")
    merged = merge(mine, pushed, pushed)
    body = ModelCard(merged).text
    places = [body.index(part) for part in ("A\n", "better words", "C\n")]
    assert places == sorted(places) and "b\n<!-- /opefo_trl: evaluation" in body
    assert "first words" not in body and ModelCard(merged).data.license == "other"
    somebody = pushed.replace("first words", "words on the Hub")
    assert "words on the Hub" in merge(mine, somebody, pushed) and "better words" in merge(mine, somebody, pushed)


def test_words_on_the_hub_outlive_many_pushes():
    ours = card(f"{block('model', 'ours')}\n", license="apache-2.0")
    there = card("# Keep this.\n", license="mit", tags="mine")
    for _ in range(3):
        there = merge(ours, there, ours)
        data = ModelCard(there).data
        assert there.count("# Keep this.") == 1 and data.license == "mit" and data.tags == ["mine"]


def test_edits_on_both_sides_of_one_text_meet_paragraph_by_paragraph():
    model, ours = block("model", "m"), "A\n\nFoo\n\n```\na\n\nb\n```"
    last = card(f"{model}\n\n{ours}\n")
    there = card(f"{model}\n\n{ours}\n\nfrom the Hub, with Foo\n")
    for number in range(3):
        edited = card(f"{model}\n\n{ours.replace('Foo', f'Foo {number}')}\n\ncare\n")
        there, last = merge(edited, there, last), edited
        body = ModelCard(there).text
        assert body.count("Foo") == 2 and f"Foo {number}" in body and "with Foo" in body
        assert "```\na\n\nb\n```" in body and body.count("care") == 1
    there = merge(card(f"{model}\n"), there, last)
    assert "Foo 2" not in there and "care" not in there and "with Foo" in there


def test_what_was_taken_out_on_one_side_does_not_come_back():
    last = card(f"{block('model', 'a')}\n\nwords\n\n{block('citation', 'c')}\n\nmore\n", language="en")
    there = card(f"{block('model', 'a')}\n\nwords\n\n{block('citation', 'c')}\n", language="en")  # without "more"
    ours = card(f"{block('model', 'b')}\n\n{block('citation', 'c')}\n\nmore\n")  # without "words" and the language
    merged = merge(ours, there, last)
    assert "words" not in merged and "more" not in merged and ModelCard(merged).data.get("language") is None


def test_an_index_that_the_hubs_classes_do_not_read_stays_as_it_is():
    index = [{"name": "mine", "results": [{"task": {"type": "x"}, "dataset": {"type": "d"}, "metrics": []}]}]
    merged = merge(with_results("", RESULTS, "m"), card("# Mine\n", **{"model-index": index}))
    found = yaml.safe_load(merged.split("---")[1])["model-index"]
    assert found[0] == index[0] and len(found) == 2
    again = merge(with_results("", RESULTS, "m"), merged)
    assert yaml.safe_load(again.split("---")[1])["model-index"] == found


def test_a_block_that_the_new_card_lacks_stays():
    assert "scores" in merge(card(block("model", "new")), card(block("evaluation", "scores")))


def test_metadata_of_both():
    new = card(license="mit", tags=["opefo", "trl"], base_model="b/new", library_name="transformers", datasets=["d/e"])
    before = card(license="llama3.1", language="en", tags=["mine", "trl"], base_model="a/old", custom={"a": 1})
    data = ModelCard(merge(new, before)).data.to_dict()
    assert data["license"] == "llama3.1" and data["language"] == "en" and data["custom"] == {"a": 1}
    assert data["tags"] == ["mine", "trl", "opefo"] and data["base_model"] == "b/new" and data["datasets"] == ["d/e"]


def test_results_replace_those_of_the_same_measure_only():
    def result(name, value, metric="accuracy"):
        return EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=name, metric_type=metric, metric_value=value
        )

    def with_(*results):
        return f"---\n{ModelCardData(model_name='m', eval_results=list(results)).to_yaml()}\n---\n"

    merged = merge(
        with_(result("a", 2), result("c", 5)), with_(result("a", 1), result("a", 9, "pass"), result("b", 3))
    )
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in ModelCard(merged).data.eval_results}
    assert found == {("a", "accuracy"): 2, ("a", "pass"): 9, ("b", "accuracy"): 3, ("c", "accuracy"): 5}


def test_snippets_load_from_the_repository():
    text = block("model", 'pipeline("text-generation", model="out/x")\nEntropyCurves.load("out/x")') + '\nmodel="keep"'
    told = addressed(text, "alice/x")
    assert told.count('"alice/x"') == 2 and "out/x" not in told and told.endswith('model="keep"')


# ---- evaluation


def test_results_as_the_hubs_own_classes():
    text = with_results("", RESULTS, "my-model")
    assert problems_of(text) == []
    found = ModelCard(text).data.eval_results
    assert [(one.dataset_type, one.metric_name, one.metric_value) for one in found] == [
        ("math-ai/aime24", "avg@32", 12.5),
        ("math-ai/aime24", "pass@32", 40.0),
        ("playground", "avg@1", 50.0),
    ]
    first = found[0].metric_args
    assert first["k"] == 32 and first["interval_95"] == [7.0, 19.0] and first["problems"] == 30
    assert first["temperature"] == 0.6 and first["grader"] == "math-verify 0.9" and "limit" not in first
    assert "| AIME 2024 | 30 | 32 | 12.5% | 7.0 to 19.0 | 40.0% |" in text and "math-verify 0.9" in text
    assert len(results_of(RESULTS)) == 3


def test_results_join_a_card():
    before = card("# Mine\n\nwords\n", license="mit")
    once = with_results(before, RESULTS, "m")
    assert "words" in once and ModelCard(once).data.license == "mit"
    again = with_results(once, RESULTS, "m")
    assert again == once and again.count("## Evaluation") == 1


# ---- what a run says


def test_where_a_model_comes_from(tmp_path):
    assert str(Base.of("Qwen/Qwen3-0.6B")) == "[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)"
    assert Base.of(str(MODEL)).licence == {"license": "apache-2.0"} and Base.of(str(MODEL)).hub is None
    mine = tmp_path / "mine"
    mine.mkdir()
    assert str(Base.of(str(mine))) == "a local model, `mine`" and Base.of(str(mine)).hub is None
    (mine / "README.md").write_text(card(base_model="Qwen/Qwen3-0.6B", license="other", license_name="qwen"))
    base = Base.of(str(mine))
    assert base.hub == "Qwen/Qwen3-0.6B" and base.licence == {"license": "other", "license_name": "qwen"}
    assert str(base).startswith("a local model, `mine`, itself from [Qwen/")
    (mine / "README.md").write_text("---\n: [\n---\n")
    assert Base.of(str(mine)).hub is None
    (mine / "README.md").write_text(card(base_model=["Qwen/Qwen3-0.6B"]))
    assert Base.of(str(mine)).hub == "Qwen/Qwen3-0.6B" and Base.of("gpt2").hub == "gpt2"
    (mine / "README.md").write_text(card(base_model="/data/llama"))
    assert Base.of(str(mine)).hub is None
    assert "None" not in str(Base.of("")) and Base.of("/tmp/merged-and-gone").hub is None


@pytest.mark.parametrize("control", list(CONTROLS))
def test_each_control_is_named_for_what_it_is(control):
    said = method_of(control, OPEFOTrainer._paper)
    assert (control in ("opefo", "none")) == (f"`{control}`" not in said)


def test_commands_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    words = "train.py --hub_token abc --hub-token=def --push-to-hub-token ghi --name my-own-token --flow_target 0.4x"
    said = without_secrets(command_of(words.split(), 1))
    assert said.startswith("python train.py") and "0.4x" in said
    assert not any(secret in said for secret in ("abc", "def", "ghi", "my-own-token"))
    words = ["train.py", "--x"]
    assert command_of(words, 8).startswith("accelerate launch --num_processes 8 train.py")
    assert command_of(["/x/ipykernel_launcher.py", "-f"], 1) == command_of(["-c"], 1) == command_of([""], 1) == ""
    config = "lr: 1\n  hub_token: abcdef\nuse: hf_" + "a" * 34 + "\n{'hub_token': x, a: known}"
    assert without_secrets(config, "known", None) == "lr: 1\n  hub_token: ***\nuse: ***\n{'hub_token': ***, a: ***}"


def test_data_sets_remember_where_they_are_from():
    files = {"hf://datasets/openai/gsm8k@e53f/main/train.parquet": {}, "https://elsewhere/x": {}}
    assert _sources(SimpleNamespace(info=SimpleNamespace(download_checksums=files))) == ["openai/gsm8k"]
    assert _sources(tiny_dataset()) is None and _sources(None) is None


def test_the_card_of_a_run(out):
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2, control="steer", control_kwargs={"map": "linear"})
    trainer.run_facts = RunFacts("openai/gsm8k", True)
    (out / "eval").mkdir()
    (out / "eval" / "results.json").write_text(json.dumps(RESULTS))
    trainer.create_model_card(model_name="tiny", tags="mine")
    text = (out / "README.md").read_text()
    data = ModelCard(text).data
    assert problems_of(text) == [] and data.datasets == ["openai/gsm8k"] and "base_model" not in data.to_dict()
    assert {"mine", "steer", "grpo"} <= set(data.tags) and "opefo" not in data.tags
    assert "the entropy control `steer`" in text and "deepseek" in text.lower() and "opefo2026" not in text
    assert "| `control_kwargs` | `{'map': 'linear'}` |" in text and "| optimizer steps | 2 of 2 |" in text
    assert "AIME 2024" in text and len(data.eval_results) == 3
    (out / "README.md").write_text(text + "\n## Afterword\n\nBy hand.\n")
    trainer.create_model_card()
    assert "By hand." in (out / "README.md").read_text()


def test_a_broken_card_is_told_at_once_and_costs_no_run(out, caplog):
    out.mkdir()
    (out / "README.md").write_text("---\n- not a map\n---\n")
    trainer = train(OPEFOTrainer, OPEFOConfig, out, max_steps=2, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 2 and "The model card could not be written: ValueError" in caplog.text
    caplog.clear()
    trainer.create_model_card()
    assert "The model card could not be written: ValueError" in caplog.text


def test_an_adapter_is_called_one(out, tmp_path):
    shutil.copytree(MODEL, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(card(base_model="Qwen/Qwen3-0.6B", license="mit"))
    from opefo_trl.playground import playground_dataset, playground_reward

    args = OPEFOConfig(
        str(out), per_device_train_batch_size=8, num_generations=4, max_completion_length=12, max_steps=2,
        save_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = OPEFOTrainer(
        str(tmp_path / "base"),
        playground_reward,
        args,
        train_dataset=playground_dataset(),
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    trainer.save_model(str(out))
    trainer.create_model_card()
    text = (out / "README.md").read_text()
    data = ModelCard(text).data
    assert data.library_name == "peft" and data.base_model == "Qwen/Qwen3-0.6B" and data.license == "mit"
    assert data.base_model_relation == "adapter" and "A LoRA adapter for a local model, `base`" in text
    assert text.count("## Training") == 1 and text.count("Framework versions") <= 1
    assert AutoModelForCausalLM.from_pretrained(out) is not None  # as the card says, with peft
    assert torch.load(out / "training_args.bin", weights_only=False).hub_token is None
