import json

import pytest
import torch

from opefo_trl.controls import make_control
from opefo_trl.files import CONTROL_STATE_FILE
from opefo_trl.flow import FlowTotals
from opefo_trl.training.control_state import load_control_state, save_control_state
from opefo_trl.training.guards import StepGuard
from opefo_trl.training.resampling import PromptOrder

CPU = torch.device("cpu")
TOTALS = FlowTotals(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 5.0, 1.0, 2.0]))


def guard(tmp_path):
    return StepGuard("skip", tmp_path, str)


def saved(tmp_path):
    control, step_guard = make_control("opefo", flow_target=0.3), guard(tmp_path)
    control.observe(TOTALS, 0, 10)
    step_guard.failed("bad")
    save_control_state(tmp_path / "checkpoint-1", "opefo", control, TOTALS, step_guard)
    return control


def test_state_totals_and_guard_come_back(tmp_path):
    before = saved(tmp_path)
    control, step_guard = make_control("opefo", flow_target=0.3), guard(tmp_path)
    totals, warning = load_control_state(tmp_path / "checkpoint-1", "opefo", control, step_guard, CPU)
    assert control.state_dict() == before.state_dict() and warning is None
    assert torch.equal(totals.sums, TOTALS.sums) and step_guard.skipped == 1


def test_the_order_of_the_prompts_comes_back(tmp_path):
    control, step_guard = make_control("none"), guard(tmp_path)

    def restored(folder):
        order = PromptOrder(range(5))
        return order, load_control_state(folder, "none", control, step_guard, CPU, order)[1]

    order = PromptOrder(range(5))
    order.take(7)
    order.put_back.append(3)
    save_control_state(tmp_path / "with", "none", control, TOTALS, step_guard, order)
    save_control_state(tmp_path / "without", "none", control, TOTALS, step_guard)
    again, warning = restored(tmp_path / "with")
    assert again.take(3) == [3, 2, 3] and warning is None
    first, warning = restored(tmp_path / "without")
    assert first.take(2) == [0, 1] and "`resample_rounds=0`" in warning
    _, warning = load_control_state(tmp_path / "with", "opefo", make_control("opefo"), step_guard, CPU)
    assert "`resample_rounds` above 0" in warning and "`control='none'`" in warning


def test_another_control_starts_with_no_state_and_says_so(tmp_path):
    saved(tmp_path)
    totals, warning = load_control_state(tmp_path / "checkpoint-1", "none", make_control("none"), guard(tmp_path), CPU)
    assert totals is not None and "`control='opefo'`" in warning and "`control='none'`" in warning


def test_a_checkpoint_without_the_file_is_warned_about(tmp_path):
    totals, warning = load_control_state(tmp_path, "opefo", make_control("opefo"), guard(tmp_path), CPU)
    assert totals is None and CONTROL_STATE_FILE in warning


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"guard": {}, "totals": [1.0]})])
def test_a_file_that_cannot_be_read_names_itself_and_the_way_out(content, tmp_path):
    (tmp_path / CONTROL_STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{CONTROL_STATE_FILE} cannot be read .*delete the file"):
        load_control_state(tmp_path, "opefo", make_control("opefo"), guard(tmp_path), CPU)
