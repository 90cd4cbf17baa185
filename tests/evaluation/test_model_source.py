"""Models, adapters and their base models as folders."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hub.conftest import hub  # noqa: F401
from huggingface_hub import constants, snapshot_download
from trl import ModelConfig

from opefo_trl.cli.preflight import check_model
from opefo_trl.evaluation.model_source import ModelSource
from opefo_trl.playground import MODEL


def test_an_adapter_has_the_tokenizer_and_the_context_of_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(MODEL), "r": 4}))
    adapter, model = ModelSource(str(tmp_path), revision="main"), ModelSource("playground", revision="main")
    assert adapter.adapter["r"] == 4 and model.adapter is None
    assert adapter.base == model.base == str(MODEL)
    assert adapter.context() == model.context() and ModelSource("playground", max_model_length=7).context() == 7
    assert adapter.tokenizer().get_vocab() == model.tokenizer().get_vocab()
    assert adapter.hub_options["revision"] is None and model.hub_options["revision"] == "main"


def test_the_fingerprint_changes_with_the_weights(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    before = ModelSource(str(folder)).fingerprint()
    (folder / "model.safetensors").touch()  # saved once more, as they were
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (folder / name).write_bytes(b"no weights")
    assert before == ModelSource(str(folder)).fingerprint() == ModelSource("playground").fingerprint()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert ModelSource(str(folder)).fingerprint() != before


def test_a_large_file_is_read_in_slices_from_all_over_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(20_000_000))
    before = ModelSource(str(tmp_path)).fingerprint()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        for place in (5, 19_999_999):
            file.seek(place)
            file.write(b"x")
            file.flush()
            os.utime(tmp_path / "model.safetensors", ns=(place, place))  # a file system's clock may be too coarse
            assert ModelSource(str(tmp_path)).fingerprint() != before
            file.seek(place)
            file.write(b"\0")


@pytest.mark.slow
def test_a_model_on_the_hub_is_known_by_its_weights(hub, monkeypatch):  # noqa: F811
    for file in ("config.json", "model.safetensors"):
        hub.write("alice/model", file, (MODEL / file).read_bytes())
    before = ModelSource("alice/model").fingerprint()
    hub.write("alice/model", "eval/results.json", b"{}")  # another commit, and the same weights
    assert ModelSource("alice/model").fingerprint() == before
    snapshot_download("alice/model")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert ModelSource("alice/model").fingerprint() == before
    hub.write("alice/model", "model.safetensors", (MODEL / "model.safetensors").read_bytes() + b"x")
    assert ModelSource("alice/model").fingerprint() != before
    assert ModelSource("alice/model", hub.commits("alice/model")[1].oid).fingerprint() == before


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_one(hub):  # noqa: F811
    config = {"base_model_name_or_path": str(MODEL), "r": 4}
    hub.write("alice/adapter", "adapter_config.json", json.dumps(config).encode())
    hub.write("alice/adapter", "adapter_model.safetensors", b"weights")
    hub.write("alice/adapter", "checkpoint-1/adapter_model.safetensors", b"weights of before")
    check_model(ModelConfig("alice/adapter"), False)
    source = ModelSource("alice/adapter")
    assert source.adapter["r"] == 4 and source.base == str(MODEL)
    names = {path.name for path in Path(source.path).iterdir()}
    assert names == {".gitattributes", "adapter_config.json", "adapter_model.safetensors"}  # and no checkpoint
    before = source.fingerprint()
    hub.write("alice/adapter", "adapter_model.safetensors", b"other weights")
    assert ModelSource("alice/adapter").fingerprint() != before
