"""Names are checked before anything is built, and a user's mistakes end in one line."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tiny import build
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.cli.parser import Parser, UsageError, plain_errors, split_options
from opefo_trl.evaluation.engines import Decoding

CPU = ["--use_cpu", "true", "--bf16", "false"]


@dataclass
class Options:
    colour: str = "red"


def parse(*words):
    return Parser((Options, OPEFOConfig, ModelConfig)).parse([*words, "--output_dir", "x", *CPU])


@pytest.mark.parametrize("words", [["--config", "c.yaml"], ["--config=c.yaml"]])
def test_the_command_line_goes_before_the_config_file(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("colour: green\nlearning_rate: 1.0e-3\nseed: 5\n")
    parser = Parser((Options, OPEFOConfig, ModelConfig))
    options, args, _ = parser.parse([*words, "--seed", "7", "--output_dir", "x", *CPU])
    assert (options.colour, args.learning_rate, args.seed) == ("green", 1e-3, 7)
    assert str(parser.config_file) == "c.yaml"


def test_the_default_config_is_for_the_playground_only(tmp_path, capsys):
    default = tmp_path / "default.yaml"
    default.write_text("seed: 5\n")
    words = ["--output_dir", "x", *CPU]
    given = "", "--model_name_or_path playground", "--model-name-or-path=playground"
    others = "--model_name_or_path other/model", "--model-name-or-path other/model", "--model_name_or_path=other/model"
    for chosen in (*given, *others):
        parser = Parser((Options, OPEFOConfig, ModelConfig))
        assert parser.parse([*words, *chosen.split()], default)[1].seed == (5 if chosen in given else 42)
    assert capsys.readouterr().err.count("default.yaml") == 3


def test_an_option_has_one_spelling():
    words = ["--learning-rate=1e-3", "--use_cpu", "--a-b", "c-d", "--e-f=-7", "-h", "--g="]
    split = ["--learning_rate", "1e-3", "--use_cpu", "--a_b", "c-d", "--e_f=-7", "-h", "--g", ""]
    assert split_options(words) == split


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flow_traget", "0.4"], "'flow_traget'.*'flow_target'"),
        (["--zzzzzz", "1"], "'zzzzzz'.*--help"),
        (["--max_steps", "many"], "max_steps.*'many'"),
        (["stray"], "'stray'"),
        (["--generation_batch_size", "7"], "generation_batch_size"),  # TRL's own check
        (["--eval_strategy", "sometimes"], "sometimes"),  # transformers' own check
    ],
)
def test_a_mistake_on_the_command_line_is_a_usage_error(words, message):
    with pytest.raises(UsageError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"colour: [red\n", "YAML"),
        (b"\xff\xfe\x00", "YAML"),
        (b"just text\n", "map"),
        (b"color: red\n", "'color'.*'colour'"),
        (b"7: red\n", "'7'"),
    ],
)
def test_a_mistake_in_a_config_file_names_the_file(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        parse("--config", str(path))
    assert str(path) in str(caught.value)


# ---- which errors are the user's


def deep_in_a_library(*_, **__):
    Dataset.from_dict({"a": [1]}).train_test_split(test_size=5)


MISTAKES = {
    "value": lambda: Decoding(top_p=2),
    "setting": lambda: parse("--generation_batch_size", "7"),
    "file": lambda: PreTrainedTokenizerFast.from_pretrained("/nowhere/at/all"),  # missed deep in transformers
    "package": lambda: importlib.import_module("nowhere_at_all"),
    # TRL's own check: there is one reward function
    "trainer": lambda: build(GRPOTrainer, GRPOConfig, "x", reward_weights=[1.0, 2.0]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_is_one_line(mistake, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, plain_errors("some.py"):
        MISTAKES[mistake]()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("opefo-trl some: error: ") and error.count("\n") == 1
    monkeypatch.setenv("OPEFO_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError, ImportError)), plain_errors("some.py"):
        MISTAKES[mistake]()


def test_a_check_of_the_script_itself_is_one_line(tmp_path):
    code = compile("raise ValueError('`k=0` must be 1 or more.')", str(tmp_path / "some.py"), "exec")
    with pytest.raises(SystemExit), plain_errors("some.py"):
        exec(code)
    with pytest.raises(ValueError, match="`k=0`"), plain_errors("other.py"):
        exec(code)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError, RuntimeError, TypeError])
def test_an_error_that_a_user_cannot_mend_keeps_its_traceback(error):
    with pytest.raises(error), plain_errors("some.py"):
        raise error("here")


def test_a_value_error_deep_in_a_library_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.__init__", deep_in_a_library)
    for call in (deep_in_a_library, lambda: build(OPEFOTrainer, OPEFOConfig, tmp_path)):
        with pytest.raises(ValueError, match="test_size"), plain_errors("some.py"):
            call()


def test_a_value_error_that_no_check_raised_keeps_its_traceback(tmp_path):
    code = compile("for one, other in zip([1], [], strict=True): pass", str(tmp_path / "some.py"), "exec")
    with pytest.raises(ValueError, match="shorter"), plain_errors("some.py"):
        exec(code)
