import json
import shutil

import pytest
from eval_script import run

from opefo_trl.playground import MODEL


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of one evaluation of the playground: 18 problems, 4 samples each."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    run(out)
    return out


@pytest.fixture(scope="session")
def long_context(tmp_path_factory):
    """The playground's model with room for long prompts: its rotary positions have no end."""
    folder = tmp_path_factory.mktemp("model") / "long"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder
