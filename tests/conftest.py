import gc
import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that does other work as well may pause for a second, which says nothing about the code
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

LONGEST = {"test_collapse.py", "test_notebook.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Exempt all imported modules from garbage collection, which transformers' Trainer asks for after every run."""
    gc.freeze()


def _write_blank(_: object, path: str | Path | None = None, **__: object) -> None:
    if path is not None:
        Path(path).touch()


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an empty file for a run's picture, except in tests/curves: drawing takes longer than a tiny run."""
    if request.path.parent.name != "curves":
        monkeypatch.setattr("opefo_trl.curves.EntropyCurves.plot", _write_blank)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make SmolLM2, or take the folder that OPEFO_SMOLLM2 names."""
    if made := os.environ.get("OPEFO_SMOLLM2"):
        return Path(made)
    pytest.importorskip("gguf")
    from opefo_trl.playground.smollm2 import make_folder

    output = tmp_path_factory.mktemp("smollm2") / "model"
    try:
        make_folder(output)
    except OSError as error:  # no network
        pytest.skip(str(error))
    return output


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save the tiny policy and its tokenizer, so that a reference model can be loaded from there."""
    from tiny import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("tiny-policy")
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the playground's model with room for long prompts: its rotary positions have no end."""
    from opefo_trl.playground import MODEL

    folder = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
