"""opefo-trl plan, as a person calls it."""

from pathlib import Path

import pytest

from opefo_trl.plan.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
SEVEN = ["--config", str(CONFIGS / "qwen2.5-math-7b.yaml")]


def run(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    output = capsys.readouterr()
    return stop.value.code, output.out + output.err


def test_a_recipe_that_fits_and_one_that_does_not(capsys):
    status, text = run(capsys, *SEVEN, "--gpus", 8, "--memory", 80)
    assert status == 0 and "7,615.6 million parameters, on 8 GPUs of 80 GiB, sharding zero3" in text
    assert "256 completions of up to 256 + 3000 tokens" in text and "It fits" in text
    assert "32 of the longest sequences at once" in text
    rows = dict(line.rsplit(maxsplit=2)[::2] for line in text.split("generating\n")[1].split("\n\n")[0].splitlines())
    assert {*rows} == {"weights", "optimizer", "communication", "gradients", "activations", "engine", "sum"}
    assert float(rows["engine"]) == 28.0 and float(rows["weights"]) == 1.77  # 0.35 x 80; 2 bytes / 8
    status, text = run(capsys, *SEVEN, "--memory", 24)
    assert status == 1 and "sharding none" in text and "It does not fit: training takes" in text


def test_accelerate_and_options_of_train_py_are_followed(capsys):
    machine = ["--accelerate_config", CONFIGS / "accelerate" / "zero2.yaml"]
    assert "8 GPUs of 80 GiB, sharding zero2" in run(capsys, *SEVEN, *machine)[1]
    assert "4 GPUs of 40 GiB, sharding fsdp" in run(
        capsys, *SEVEN, *machine, "--gpus", 4, "--memory", 40, "--sharding", "fsdp"
    )[1]  # fmt: skip
    words = ["--per_device_train_batch_size=2", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    text = run(capsys, *SEVEN, *words, "--max_completion_length", "100", "--prompt_tokens", "50")[1]
    assert "16 completions of up to 50 + 100 tokens a step, 2 in a micro-batch" in text
    words = ["--per-device-train-batch-size=2", "--reward_funcs", "math", "--dataset_name", "train.jsonl"]
    text = run(capsys, *SEVEN, "--accelerate_config", 4, *words)[1]
    assert "4 GPUs of 80 GiB, sharding ddp" in text and "2 in a micro-batch" in text
    text = run(capsys, "--config", CONFIGS / "quickstart.yaml", "--gpus", 2)[1]
    assert "on 2 processes" in text and "sharding ddp" in text and "vLLM" not in text and "CUDA" not in text


def test_a_misspelt_name_in_a_recipe_is_refused_as_by_train_py(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct\nmax_completion_lenght: 30\n")
    status, text = run(capsys, "--config", recipe)
    assert status == 2 and "'max_completion_lenght'" in text and "Did you mean 'max_completion_length'?" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SEVEN, "--gpus", "0"], "`gpus=0` must be a number of at least 1"),
        ([*SEVEN, "--memory", "-80"], r"`memory=-80.0` must be a number above 0"),
        ([*SEVEN, "--prompt_tokens", "0"], "`prompt_tokens=0`"),
        ([*SEVEN, "--use_peft", "--lora_modules_to_save", "lm_head"], "`lora_modules_to_save` is not planned"),
        ([*SEVEN, "--num_generation", "4"], "'num_generation' .on the command line.. Did you mean 'num_generations'"),
        ([*SEVEN, "--gpu", "4"], "'gpu' .on the command line.. Did you mean 'gpus'"),
        ([*SEVEN, "--use_peft", "maybe"], "`use_peft='maybe'` must be True or False"),
        ([*SEVEN, "--per_device_train_batch_size", "1.5"], "`per_device_train_batch_size=1.5` must be a whole number"),
        ([*SEVEN, "--accelerate_config", "0"], "`gpus=0`"),
        (["4", *SEVEN], "'4' belongs to no option"),
        (["--config", "none.yaml"], "`config='none.yaml'` is no file"),
        ([*SEVEN, "--accelerate_config", __file__], "is not YAML"),
        (["--config", str(CONFIGS / "accelerate" / "ddp.yaml")], "names no model.*--model_name_or_path"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    import re

    status, text = run(capsys, *words)
    assert status == 2 and len(text.splitlines()) == 1 and text.startswith("opefo-trl plan: error:")
    assert re.search(message, text), text
