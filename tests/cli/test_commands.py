"""opefo-trl: help, recipes and machines by name, mistakes in a line. (Runs: test_wheel.py, test_two_machines.py.)"""

import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from scripts import ROOT, python
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from opefo_trl.cli import commands
from opefo_trl.cli.commands import main

CONFIGS = ROOT / "configs"
HELPS = [
    [],
    *([name] for name in commands._COMMANDS),
    ["hub", "push"],
    ["playground", "build"],
    ["playground", "smollm2"],
]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_fits_a_screen_and_names_the_page_that_has_the_rest(words, capsys):
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: opefo-trl", *words])) and text.count("\n") <= 24
    pages = re.findall(r"[\w/]+\.md", text.split("Page: ")[1])
    assert pages and all((ROOT / page).exists() for page in pages)


def test_help_lists_every_subcommand_and_loads_nothing_heavy():
    code = "import sys; from opefo_trl.cli.commands import main; main([]); print({'torch', 'trl'} & {*sys.modules})"
    text = python("-c", code)
    assert all(f"  {name} " in text for name in commands._COMMANDS) and text.endswith("set()\n")


def test_help_all_lists_every_option_of_the_script(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help", "all"])
    text = capsys.readouterr().out
    assert not stop.value.code and text.startswith("usage: opefo-trl train ") and "--flow_target" in text


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Return what is started instead of starting it: None or the options of `accelerate launch`, and the script's."""

    def run(*words, gpus=0, default=False):
        calls = []
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        file = ROOT / "pyproject.toml" if default else tmp_path / "nowhere.yaml"
        monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
        monkeypatch.setattr(runpy, "run_path", lambda script, run_name: calls.append((None, sys.argv)))
        monkeypatch.setattr(commands, "_launch", lambda program, words: calls.append((words, words)))
        main(list(words))
        ((launch, arguments),) = calls
        place = next(place for place, word in enumerate(arguments) if word.endswith(".py"))
        assert Path(arguments[place]) == ROOT / f"{words[0]}.py"
        return launch and launch[:place], arguments[place + 1 :]

    return run


def machine(name, *options):
    return ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml"), *options]


def number(name, processes):
    return machine(name, f"--num_processes={processes}", "--mixed_precision=no")


# words after `train`, GPUs -> options of `accelerate launch`; None where it is not used
LAUNCHES = [
    ("", 0, None),
    ("--use_cpu false", 1, None),
    ("--use_cpu false", 8, number("ddp", 8)),
    ("--model_name_or_path some/model", 8, number("ddp", 8)),
    # a run on the CPU takes one process, whatever GPUs there are
    ("", 8, None),
    ("--model-name-or-path playground", 8, None),
    ("--model_name_or_path some/model --use-cpu", 8, None),
    ("--accelerate_config 1", 8, None),
    # or as many as it is given
    ("--accelerate_config 2", 1, number("cpu", 2)),
    ("--num_processes 16", 8, number("cpu", 16)),
    ("--accelerate_config 2", 0, number("cpu", 2)),
    ("--use_cpu false --accelerate_config=4", 8, number("ddp", 4)),
    ("--use_cpu false --num_processes 4", 8, number("ddp", 4)),
    ("--use_cpu false --accelerate_config 1 --num_processes 4", 8, number("ddp", 4)),
    ("--accelerate_config zero3", 8, machine("zero3")),
    ("--accelerate_config fsdp2 --num_processes 2", 2, machine("fsdp2", "--num_processes=2")),
    (
        "--accelerate_config multi_node --machine_rank 1 --main_process_ip 10.0.0.7",
        8,
        machine("multi_node", "--machine_rank=1", "--main_process_ip=10.0.0.7"),
    ),
]


@pytest.mark.parametrize(("words", "gpus", "launch"), LAUNCHES)
def test_a_machine_is_a_name_a_file_or_a_number(words, gpus, launch, started):
    rest = ["--max_steps", "3", "--eval_prompts", "-1"]
    result, passed_on = started("train", *words.split(), *rest, gpus=gpus)
    assert result == launch and passed_on[-4:] == rest and not any("accelerate" in word for word in passed_on)


def test_a_file_and_what_accelerate_config_has_written_are_machines_too(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text((CONFIGS / "accelerate" / "cpu.yaml").read_text())
    assert started("train", "--accelerate_config", "mine.yaml") == (["--config_file", "mine.yaml"], [])
    assert started("train", "--use_cpu=false", gpus=8, default=True) == ([], ["--use_cpu=false"])


def test_evaluation_takes_one_process_unless_it_is_given_more(started):
    words = ["--model", "out", "--k", "4"]
    assert started("eval", *words, gpus=8) == (None, words)
    assert started("eval", *words, "--accelerate_config", "2", gpus=8) == (number("ddp", 2), words)


def test_a_recipe_is_a_name_or_a_file(started):
    recipe = str(CONFIGS / "qwen2.5-math-7b.yaml")
    for words in ("--config qwen2.5-math-7b", f"--config={recipe}"):
        rest = ["--config", recipe, "--max_steps", "3"]
        assert started("train", "--max_steps", "3", *words.split()) == (None, rest)
        assert started("train", "--max_steps", "3", *words.split(), gpus=2) == (number("ddp", 2), rest)
    assert started("train", "--config", "smollm2-words", gpus=2)[0] is None  # it has `use_cpu`


MISTAKES = {  # words, GPUs -> words of the line
    ("trian", 0): ["'trian'", "'train'", *commands._COMMANDS],
    ("--max_steps 3", 0): ["'--max_steps'", *commands._COMMANDS],
    ("train --config quikstart", 0): ["`config='quikstart'`", "'quickstart'", "qwen3-4b-base"],
    ("train --accelerate_config zer3", 0): ["`accelerate_config='zer3'`", "'zero3'", "multi_node"],
    ("train --accelerate_config 0", 0): ["`accelerate_config=0`"],
    ("train --use_cpu false --accelerate_config 16", 8): ["16 processes", "8 GPUs", "--num_processes 8"],
    ("train --accelerate_config zero3", 4): ["zero3", "8 processes", "4 GPUs", "--num_processes 4"],
    ("train --accelerate_config multi_node", 4): ["8 processes", "4 GPUs", "--num_processes 8"],
    ("train --accelerate_config train.py", 0): ["'train.py'", "accelerate"],
    ("train --num_processes -2", 0): ["`accelerate_config=-2`", "at least 1"],
    ("train --machine_rank 1", 0): ["`machine_rank`", "--accelerate_config"],
}


@pytest.mark.parametrize(("words", "gpus"), MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(words, gpus, started, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        started(*words.split(), gpus=gpus)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("opefo-trl") and line.count("\n") == 1
    assert [word for word in MISTAKES[words, gpus] if word not in line] == []


def test_the_playground_passes_its_options_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("opefo_trl.playground.smollm2.main", calls.append)
    main(["playground", "smollm2", "out/smollm2", "--wheel", "a.whl"])
    assert calls == [["out/smollm2", "--wheel", "a.whl"]]
    with pytest.raises(SystemExit, match="2"):
        main(["playground", "smolm2"])
    assert "'smollm2'" in (error := capsys.readouterr().err) and "'build'" in error


KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM
ENDS = [  # exit codes of the ranks -> exit code of the command, words of its line, words that are not in it
    ({0: 2, 1: TERMINATED}, 2, [], []),
    ({0: 130, 1: 130}, 130, [], []),
    ({0: TERMINATED, 1: KILLED}, 137, ["Rank 1 was killed by SIGKILL", "memory", "resumes"], ["Rank 0"]),
    ({0: TERMINATED, 1: 1}, 1, ["Rank 1 ended with status 1", "another machine", "resumes"], ["Rank 0", "memory"]),
    ({3: TERMINATED}, 143, ["Rank 3 was killed by SIGTERM", "resumes"], ["memory", "above"]),
]


@pytest.mark.parametrize(("codes", "status", "words", "others"), ENDS)
def test_the_rank_that_failed_is_named(codes, status, words, others, capsys):
    with pytest.raises(SystemExit) as stop:
        commands._blame("opefo-trl train", codes)
    text = capsys.readouterr().err
    assert stop.value.code == status and text.count("\n") == (1 if words else 0)
    assert all(word in text for word in words) and not any(word in text for word in others)


@pytest.fixture
def handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


FAILURES = [  # what `accelerate launch` raises -> exit code of the command, words of its line
    (ImportError("DeepSpeed is not installed"), 2, "opefo-trl train: error: DeepSpeed is not installed"),
    (ConnectionError("port `29500`"), 2, "port `29500`"),
    (subprocess.CalledProcessError(2, []), 2, ""),
    (subprocess.CalledProcessError(-9, []), 137, "Rank 0 was killed by SIGKILL"),
    (ChildFailedError("train.py", {3: ProcessFailure(3, 7, 1, "")}), 1, "Rank 3 ended with status 1"),
    (SignalException("", signal.SIGTERM), 143, ""),
]


@pytest.mark.parametrize(("error", "status", "line"), FAILURES)
def test_a_failed_launch_has_a_status_and_a_line_and_no_traceback(error, status, line, handlers, monkeypatch, capsys):
    def launch(options):
        assert options.num_processes == 2 and options.training_script == "train.py"
        assert options.training_script_args == ["--max_steps", "3"]
        raise error

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    with pytest.raises(SystemExit) as stop:
        commands._launch("opefo-trl train", ["--num_processes=2", "train.py", "--max_steps", "3"])
    assert stop.value.code == status
    assert line in (text := capsys.readouterr().err) and text.count("\n") == bool(line)


@pytest.mark.slow
def test_sigterm_ends_a_single_process_that_accelerate_has_started(tmp_path):
    (tmp_path / "train.py").write_text("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)")
    machine = ["--num_processes=1", "--num_machines=1"]
    code = f"from opefo_trl.cli.commands import _launch; _launch('opefo-trl train', {[*machine, 'train.py']})"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    (script,) = psutil.Process(launcher.pid).children()
    launcher.terminate()
    assert "Rank 0 was killed by SIGTERM" in launcher.communicate(timeout=30)[1]
    assert launcher.returncode == 143 and not script.is_running()
