import pytest
from scripts import python

import opefo_trl


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("opefo_trl", ("torch", "trl", "transformers", "numpy")),
        ("opefo_trl.evaluation.metrics", ("torch", "trl", "transformers", "datasets", "evaluate", "pandas")),
    ],
)
def test_importing_a_light_module_loads_no_heavy_one(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_public_names_can_be_imported_and_unknown_ones_cannot():
    assert opefo_trl.OPEFOConfig.__name__ == "OPEFOConfig"
    assert opefo_trl.OPEFOTrainer.__name__ == "OPEFOTrainer"
    assert set(dir(opefo_trl)) == set(opefo_trl.__all__)
    with pytest.raises(AttributeError, match="OPEFOTrainr"):
        opefo_trl.OPEFOTrainr  # noqa: B018
