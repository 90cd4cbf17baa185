"""Models, adapters and their base models as folders."""

import json
import shutil

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
    assert before == ModelSource(str(folder)).fingerprint()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert ModelSource(str(folder)).fingerprint() != before
