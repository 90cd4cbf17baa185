"""The notebook runs top to bottom in a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is committed
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # one that grows with each run, and one of both
    table = outputs[-1]["data"]["text/plain"].splitlines()
    scores = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in table[1:]}
    assert scores["OPEFO"][1] > scores["GRPO"][1] and scores["OPEFO"][2] > scores["GRPO"][2]
    assert (tmp_path / "out" / "notebook-opefo" / "report.html").exists()
