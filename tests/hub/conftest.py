"""A Hub on loopback for the huggingface_hub client of this process and of its children, and a run to push there."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http

from opefo_trl.hub import publisher

CARD = "---\ntags: [opefo]\n---\n\n<!-- opefo_trl: model -->\n# model\n<!-- /opefo_trl: model -->\n"


class ShortSleeps:
    """The module `time` with sleeps of a hundredth, for the retries inside huggingface_hub."""

    def __getattr__(self, name):
        return getattr(publisher.time, name)

    def sleep(self, seconds):
        publisher.time.sleep(seconds / 100)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(part=256 << 10) as server:
        for name, value in server.environment(home=tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        settings = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings |= {"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in settings.items():  # read from the environment when huggingface_hub was imported
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(publisher, "PAUSES", (0.05,))
        monkeypatch.setattr(_http, "time", ShortSleeps())
        set_client_factory(_http.default_client_factory)  # without time-outs, as a process begins
        publishers, make = [], publisher.Publisher.__init__
        monkeypatch.setattr(
            publisher.Publisher, "__init__", lambda self, *args: publishers.append(self) or make(self, *args)
        )
        yield server
        for made in publishers:
            made.stop()


@pytest.fixture
def run(tmp_path) -> Path:
    """Make a folder as a run leaves it: two checkpoints and the last model, some files in several parts of LFS."""
    out = tmp_path / "model"
    files = {
        **{f"checkpoint-{step}/model.safetensors": bytes([step]) * (600 << 10) for step in (2, 10)},
        **{f"checkpoint-{step}/optimizer.pt": bytes([step]) * 10 for step in (2, 10)},
        **{f"checkpoint-{step}/trainer_state.json": json.dumps({"global_step": step}).encode() for step in (2, 10)},
        **{"model.safetensors": b"\1" * (600 << 10), "config.json": b"{}", "README.md": CARD.encode()},
        **{"report.html": b"<html></html>", "completions/1.parquet": b"rows", "nonfinite/dump.pt": b"private"},
    }
    for path, content in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    return out
