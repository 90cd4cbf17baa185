import subprocess
import sys

import pytest

import opefo_trl


def test_importing_the_package_loads_neither_torch_nor_trl():
    code = "import sys, opefo_trl; print([m for m in ('torch', 'trl', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_public_names_can_be_imported_and_unknown_ones_cannot():
    assert opefo_trl.OPEFOConfig.__name__ == "OPEFOConfig"
    assert opefo_trl.OPEFOTrainer.__name__ == "OPEFOTrainer"
    assert set(dir(opefo_trl)) == set(opefo_trl.__all__)
    with pytest.raises(AttributeError, match="OPEFOTrainr"):
        opefo_trl.OPEFOTrainr  # noqa: B018
