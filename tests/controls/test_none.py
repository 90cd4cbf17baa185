import pytest
from control_inputs import tokens_of, totals

from opefo_trl.controls import Control, make_control


@pytest.mark.parametrize("control", [make_control("none"), Control()])
def test_none_and_the_base_change_nothing(control):
    tokens = tokens_of([[1.0, -1.0]], [2.0])
    control.observe(totals(), 0, 10)
    assert control.advantages(tokens) is tokens.advantages
    assert control.clip_range(tokens) is None and control.penalty(tokens) is None
    assert control.metrics() == {} and control.state_dict() == {} and control.source is None
    assert not (control.needs_totals or control.shapes_tokens or control.uses_clip_range)
