import pytest

from opefo_trl.grading import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader() as shared:
        yield shared
