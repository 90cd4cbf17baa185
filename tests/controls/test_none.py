from control_inputs import tokens_of, totals

from opefo_trl.controls import make_control


def test_none_changes_nothing():
    tokens, control = tokens_of([[1.0, -1.0]], [2.0]), make_control("none")
    control.observe(totals(), 0, 10)
    assert control.advantages(tokens) is tokens.advantages
    assert control.clip_range(tokens) is None and control.penalty(tokens) is None
    assert control.metrics() == {} and control.state_dict() == {} and not control.needs_totals
