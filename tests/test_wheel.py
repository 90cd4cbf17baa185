"""Wheel and sdist hold all that they should, and the wheel runs without a checkout. `make wheel` installs it."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from scripts import ROOT, python

import opefo_trl
from opefo_trl.curves import EntropyCurves

pytestmark = pytest.mark.slow
BUILD = "import sys; from setuptools import build_meta as make; getattr(make, sys.argv[1])('dist')"


def build(kind: str, source: Path) -> Path:
    python("-c", BUILD, kind, cwd=source)
    (made,) = (source / "dist").glob("*.whl" if kind == "build_wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build from a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    untracked = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=untracked)
    return build("build_sdist", copy)


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    """Unpack the wheel that is built from the sdist, as pip does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    with zipfile.ZipFile(build("build_wheel", source)) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(unpacked, folder, *words):
    return python(*words, cwd=folder, PYTHONPATH=str(unpacked))


def command(unpacked, folder, words):
    """Run `opefo-trl` by its entry point, of which pip makes a script."""
    load = (
        "from importlib.metadata import entry_points as points; points(group='console_scripts')['opefo-trl'].load()()"
    )
    run(unpacked, folder, "-c", load, *words.split())


def test_the_sdist_has_sources_documents_and_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = """
        train.py eval.py setup.py CITATION.cff LICENSE README.md Makefile constraints.txt configs/quickstart.yaml
        docs/release.md tests/test_wheel.py benchmarks/publishing.py
    """
    assert set(wanted.split()) <= names
    assert not any(name.endswith(".pyc") or name.startswith((".hub", "out/")) for name in names)


def test_the_wheel_has_template_playground_and_recipes(unpacked):
    package = unpacked / "opefo_trl"
    data = "hub/model_card_template.md hub/evaluation_template.md curves/report.html py.typed playground/words.txt"
    for name in [*data.split(), "recipes/train.py", "recipes/eval.py"]:
        assert (package / name).is_file(), name
    for path in (ROOT / "opefo_trl" / "playground" / "model").iterdir():
        assert (package / "playground" / "model" / path.name).read_bytes() == path.read_bytes()
    recipes = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert recipes == {path.relative_to(package / "recipes/configs") for path in package.rglob("recipes/**/*.yaml")}
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"opefo_trl"}


def test_the_wheel_runs_five_lines_and_its_recipes(unpacked, tmp_path):
    where = "import opefo_trl; print(opefo_trl.__file__)"
    assert run(unpacked, tmp_path, "-c", where).startswith(str(unpacked))
    run(unpacked, tmp_path, ROOT / "tests" / "runs" / "five_lines.py")
    assert (tmp_path / "out" / "five-lines" / "entropy_curves.png").exists()
    command(
        unpacked, tmp_path, "train --max_steps 3 --per_device_train_batch_size 32 --eval_prompts 0 --output_dir out/q"
    )
    assert "quickstart.yaml" in (tmp_path / "out" / "q" / "README.md").read_text()
    options = "--model out/q --benchmarks playground --k 1 --max_new_tokens 12"
    run(unpacked, tmp_path, "-m", "opefo_trl.recipes.eval", *options.split())


def test_the_command_of_the_wheel_trains_in_two_processes_and_evaluates(unpacked, tmp_path):
    rows = "--per_device_train_batch_size 2 --num_generations 4 --eval_prompts 0"  # a group takes both processes
    launch = "--accelerate_config cpu --main_process_port 0"
    command(unpacked, tmp_path, f"train --max_steps 3 {rows} {launch} --output_dir out/q")
    assert EntropyCurves.load(tmp_path / "out" / "q").to_pandas()["step"].tolist() == [1, 2, 3]
    command(unpacked, tmp_path, "eval --model out/q --benchmarks playground --k 1 --max_new_tokens 12")
    assert (tmp_path / "out" / "q" / "eval" / "results.json").exists()
    with pytest.raises(
        AssertionError, match=r"opefo-trl: error: .*'trian'.*'train'.* train, eval, plan, curves, hub, playg"
    ):
        command(unpacked, tmp_path, "trian")


def test_the_citation_is_right():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == opefo_trl.__version__ and citation["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2605.11491"
