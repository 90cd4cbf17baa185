import pytest
from eval_script import run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of one evaluation of the playground: 36 problems, 4 samples each."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    run(out)
    return out
