"""benchmarks/gpu.py on toys: every piece runs, writes its numbers, and is stopped or repeated as it says."""

import json
import sys
import time

import pytest
from scripts import ROOT, load_script, python
from trl import GRPOTrainer


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script("benchmarks/gpu.py")


@pytest.mark.slow
def test_all_pieces_run_on_toys(tmp_path):
    command = [ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--folder", tmp_path]
    printed = python(*command)
    assert "Failed" not in printed

    def results(name):
        return json.loads((tmp_path / f"{name}.json").read_text())["results"]

    assert results("overhead")["scope batch"]["ratio"] > 0
    (phase,) = results("training_phase")
    assert phase["gradient"] < 1e-5 and all(peak > 0 for peak in phase["peak_mib"])
    waits = results("sync")
    assert waits["GRPOTrainer"]["loss"] > 0  # TRL fetches its metrics there
    for name, row in waits.items():
        ours = {place: count for place, count in row["places"].items() if place.startswith("loss: opefo_trl")}
        assert sum(ours.values()) == row["loss"] - waits["GRPOTrainer"]["loss"], (name, row["places"])
        # The dump of a bad step; and totals, which the control reads from a copy on the host
        assert all("training/guards.py" in place or "controls/opefo.py" in place for place in ours), (name, ours)
    parity = results("parity")
    assert parity["opefo, fp32"]["gradient_apart"] == [0.0] and parity["opefo, fp32"]["lambda"][0] != 0
    for control in ("none", "opefo"):
        assert 0 < parity[f"{control}, bf16 autocast"]["gradient_apart"][0] < 0.1
        assert parity[f"{control}, bf16 autocast"]["cosine"][0] > 0.99
    for name, setting in (("words", "opefo"), ("sentences", "none")):
        base, step, end = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        assert base["setting"] == "base" and {"pass@1", "distinct", "written"} <= base["held_out"].keys()
        assert step["setting"] == end["setting"] == setting and step["step"] == 1
        assert {"entropy", "reward", "answers/distinct", "seconds", "flow/lambda"} <= step.keys()
        assert end["held_out"].keys() == base["held_out"].keys() and end["seconds_per_step"] > 0
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert {"device", "torch", "transformers", "trl"} <= machine.keys()
    written = (tmp_path / "words.jsonl").read_text()
    assert "step" not in python(*command, "--pieces", "words")  # nothing is left to do
    assert (tmp_path / "words.jsonl").read_text() == written


def test_the_arguments_for_a_gpu_are_options_of_the_pieces(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny"])
    options, _ = benchmark.parse()
    options.tiny = False
    for name, piece in benchmark.PIECES.items():
        parsed = sys.modules[piece.run.__module__].parse(benchmark.arguments_of(name, options))
        assert parsed.json.name == f"{name}.{piece.suffix}"
        if name in benchmark.ON_MODEL:
            assert parsed.model == "out/smollm2" and parsed.task == name.replace("parity", "words")


def test_a_piece_that_takes_too_long_is_stopped_and_leaves_nothing_behind(benchmark):
    original = GRPOTrainer._generate_and_score_completions
    with pytest.raises(TimeoutError, match="after 1 s"), benchmark.alone(1):
        GRPOTrainer._generate_and_score_completions = None
        time.sleep(5)
    assert GRPOTrainer._generate_and_score_completions is original


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no GPU here.*--device cpu --tiny"),
        (["--device", "cpu"], "sizes are for a GPU.*--tiny"),
    ],
)
def test_what_cannot_run_says_what_can(benchmark, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit, match=message):
        benchmark.main()


def test_an_interrupted_run_is_repeated_and_other_arguments_are_refused(benchmark, tmp_path):
    smollm2 = sys.modules["smollm2"]
    runs = [smollm2.Run("base", 0, []), smollm2.Run("none", 0, ["--control", "none"])]
    path = tmp_path / "words.jsonl"
    lines = smollm2.Lines(path, runs)
    lines.add({"setting": "base", "seed": 0, "arguments": []})
    lines.add({"setting": "none", "seed": 0, "step": 1})  # killed in the second step
    assert smollm2.Lines(path, runs).done == {("base", 0)} and len(path.read_text().splitlines()) == 1
    lines.add({"setting": "none", "seed": 0, "arguments": ["--control", "opefo"]})
    with pytest.raises(SystemExit, match="'none', seed 0, with --control opefo.*another --json"):
        smollm2.Lines(path, runs)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint(benchmark, tmp_path, monkeypatch):
    smollm2 = sys.modules["smollm2"]
    words = "--model playground --prompts 2 --generations 4 --steps 4 --samples 4 --held-out 2 --seeds 0".split()  # noqa: SIM905
    words += ["--settings", "none: --control none --save_steps 1"]

    def lines_of(name, *more):
        smollm2.main([*words, "--json", str(tmp_path / name), *more])
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{**line, "seconds": 0, "seconds_per_step": 0} for line in lines]

    whole, more = lines_of("whole.jsonl"), ["--checkpoints", str(tmp_path / "runs")]
    taken = smollm2.StepLines.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        taken(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smollm2.StepLines, "on_step_end", interrupted)
        lines_of("halves.jsonl", *more)
    assert [path.name for path in (tmp_path / "runs" / "none, seed 0").glob("checkpoint-*")] == ["checkpoint-2"]
    assert lines_of("halves.jsonl", *more) == whole
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("task", ["words", "sentences"])
def test_every_setting_is_one_of_train_py(benchmark, tmp_path, task):
    smollm2 = sys.modules["smollm2"]
    options = smollm2.parse(["--json", str(tmp_path / "x"), "--task", task, "--steps", "7", "--seeds", "3"])
    controls = [smollm2.parsed(run, options, str(tmp_path))[1] for run in smollm2.all_runs(options)[1:]]
    assert {args.control for args in controls} >= {"none", "opefo"} and len(controls) == len(smollm2.SETTINGS[task])
    for args in controls:
        assert args.max_steps == 7 and args.seed == 3 and args.generation_batch_size == 64
        assert args.control != "adaptive_entropy" or args.control_kwargs == {"target": 1.0}


def test_shares_divide_the_runs(benchmark, tmp_path):
    smollm2 = sys.modules["smollm2"]
    options = smollm2.parse(
        ["--json", str(tmp_path / "x"), "--seeds", "0", "1", "--settings", "a: --control none", "b:"]
    )
    runs = smollm2.all_runs(options)
    assert [(run.setting, run.seed) for run in runs] == [("base", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert runs[1].arguments[-2:] == ["--control", "none"] and "4" in runs[2].arguments  # 64 rows, 16 at a time
    assert options.share == [0, 1]
