import subprocess
import sys
import time

import pytest


def test_importing_the_package_is_fast_and_loads_neither_torch_nor_trl():
    code = "import sys, opefo_trl; print([m for m in ('torch', 'trl', 'transformers', 'numpy') if m in sys.modules])"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert run.stdout.strip() == "[]"
    assert min(times) < 0.3  # with the interpreter's own start


def test_public_names_are_there_and_unknown_ones_are_not():
    import opefo_trl

    assert opefo_trl.OPEFOConfig.__name__ == "OPEFOConfig"
    assert opefo_trl.OPEFOTrainer.__name__ == "OPEFOTrainer"
    assert set(dir(opefo_trl)) == set(opefo_trl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'OPEFOTrainr'"):
        opefo_trl.OPEFOTrainr  # noqa: B018
