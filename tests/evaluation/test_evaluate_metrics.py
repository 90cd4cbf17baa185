"""The measures as metrics of `evaluate`, loaded from the package without network."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from opefo_trl.evaluation import metrics
from opefo_trl.evaluation.metrics import metric_path

evaluate = pytest.importorskip("evaluate")
SAMPLES = [[1, 0, 0, 1], [1, 1], [0, 0, 0]]  # as many as there happen to be
BASELINE = [[0, 0], [1, 0, 1], [0, 1, 0]]


@pytest.fixture(scope="module", autouse=True)
def offline_and_in_a_folder_of_its_own(tmp_path_factory):
    def refuse(*_, **__):
        raise AssertionError("there is no network here")

    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    sys.path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture
def load(tmp_path):
    return lambda name, **options: evaluate.load(metric_path(name), cache_dir=str(tmp_path), **options)


def interval(values, mean, **options):
    low, high = metrics.bootstrap_interval(values, **options)
    return {"mean": mean, "low": low, "high": high}


# none, and none of them right; then b by 2 to 1, or in blocks of two: a is wrong, b is right
VOTES = {"predictions": [[None, None], ["a", None, "b", "b"]], "references": [[0, 0], [0, 0, 1, 1]]}
CONFIDENCE = {"predictions": [0.2, 0.8, 1.0], "references": [0, 1, 1]}


@pytest.mark.parametrize(
    ("name", "inputs", "result"),
    [
        ("avg_at_k", {"predictions": SAMPLES}, {"avg_at_k": 1 / 2}),
        ("pass_at_k", {"predictions": [[1, 0], [1, 1]], "k": 1}, {"pass@1": 3 / 4}),
        # of [1, 0, 0, 1]: 1/2, and 1 - C(2, 2) / C(4, 2) = 5/6; of [1, 1]: 1; of [0, 0, 0]: 0
        ("pass_at_k", {"predictions": SAMPLES, "k": [1, 2]}, {"pass@1": 1.5 / 3, "pass@2": (5 / 6 + 1) / 3}),
        ("majority_at_k", VOTES, {"majority_at_k": 1 / 2}),
        ("majority_at_k", {**VOTES, "k": 2}, {"majority_at_k": 1 / 4}),
        # [0, .5): .2;  [.5, 1]: (1 - .8) + (1 - 1) = .2;  .4 / 3
        ("calibration_error", {**CONFIDENCE, "bins": 2}, {"calibration_error": 0.4 / 3}),
        # (1/2 + 1/3 - 1/3) / 3
        (
            "paired_difference",
            {"predictions": SAMPLES, "references": BASELINE},
            asdict(metrics.paired_difference([0, 2 / 3, 1 / 3], [0.5, 1, 0])) | {"difference": 1 / 6, "problems": 3},
        ),
        ("bootstrap_interval", {"predictions": SAMPLES, "level": 0.8}, interval([0.5, 1, 0], 1 / 2, level=0.8)),
        ("bootstrap_interval", {"predictions": SAMPLES, "k": 2, "seed": 3}, interval([5 / 6, 1, 0], 11 / 18, seed=3)),
    ],
)
def test_a_metric_computes_what_its_measure_does(load, name, inputs, result):
    assert load(name).compute(**inputs) == pytest.approx(result)


def test_avg_at_k_in_batches_one_by_one_and_after_a_refusal(load):
    metric = load("avg_at_k")
    metric.add(prediction=SAMPLES[0])
    metric.add_batch(predictions=[[bool(value) for value in row] for row in SAMPLES[1:]])
    assert metric.compute() == {"avg_at_k": 0.5}
    with pytest.raises(ValueError, match="Problem 0 "):
        metric.compute(predictions=[[]])
    assert metric.compute(predictions=[[1]]) == {"avg_at_k": 1.0}  # nothing is left over from before


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("pass_at_k", {"predictions": [[1, 0]], "k": 4}, "`k=4`.*problem 0 has 2"),
        ("avg_at_k", {"predictions": []}, "no problems"),
        ("avg_at_k", {"predictions": [[0.5]]}, "problem 0 has 0.5"),  # 0 as an integer feature
        ("avg_at_k", {"predictions": [[1, None]]}, "problem 0 has None"),
        ("majority_at_k", {"predictions": [["a"], ["b"]], "references": [[1]]}, "Mismatch in the number"),
    ],
)
def test_refusals_come_through(load, name, inputs, message):
    metric = load(name)
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)


def test_a_metric_tells_what_it_is(load):
    metric = load("pass_at_k")
    assert metric.name == "pass_at_k" and "chance that one of k samples is right" in metric.description
    assert "1 (right) or 0" in metric.inputs_description and "1 (right) or 0" in metric.compute.__doc__


def test_several_metrics_take_the_same_samples():
    both = evaluate.combine([metric_path("pass_at_k"), metric_path("avg_at_k")])
    assert both.compute(predictions=SAMPLES) == {"pass@1": pytest.approx(0.5), "avg_at_k": 0.5}


def test_alone_nothing_is_written_so_a_folder_need_not_be_writable(tmp_path):
    from opefo_trl.evaluation.evaluate_metrics.avg_at_k import AvgAtK

    file = tmp_path / "file"
    file.touch()  # below it no folder can be made, not even by root
    assert AvgAtK(cache_dir=str(file / "cache")).compute(predictions=SAMPLES) == {"avg_at_k": 0.5}


def test_ranks_add_what_they_have_and_the_first_one_computes(load):
    def of(rank):
        return load("avg_at_k", num_process=2, process_id=rank).compute(predictions=parts[rank])

    parts = [SAMPLES[:1], SAMPLES[1:]]
    with ThreadPoolExecutor(2) as ranks:  # they meet at locks on files, like processes
        assert list(ranks.map(of, range(2))) == [{"avg_at_k": 0.5}, None]
