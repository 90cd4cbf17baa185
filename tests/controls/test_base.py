import pytest
from control_inputs import tokens_of

from opefo_trl.controls import CONTROLS, Control, make_control


def flags(control):
    return control.by_row, control.keeps_zeros


@pytest.mark.parametrize(
    ("method", "expected"),
    [("metrics", (True, True)), ("clip_range", (False, True)), ("penalty", (False, False))],
)
def test_flags_are_reset_in_a_subclass_that_overrides_the_methods_they_describe(method, expected):
    base, overridden = CONTROLS["opefo"], {method: lambda self, *tokens: None}
    assert flags(base) == flags(CONTROLS["none"]) == (True, True)
    subclass = type("Subclass", (base,), overridden)
    mixed = type("Mixed", (type("Mixin", (), overridden), base), {})
    assert flags(subclass) == flags(mixed) == expected
    assert type("Declared", (subclass,), {"by_row": True}).by_row
    assert subclass().uses_clip_range == (method == "clip_range")


def test_a_control_of_ones_own_can_be_registered(monkeypatch):
    class Halve(Control):
        def __init__(self, *, by: float = 2.0):
            self.by = by

        def advantages(self, tokens):
            return tokens.advantages / self.by

    monkeypatch.setitem(CONTROLS, "halve", Halve)
    assert make_control("halve", by=4.0).advantages(tokens_of([[1.0]], [2.0])).tolist() == [[0.5]]
    with pytest.raises(ValueError, match=r"`control='halve'` .*'buy'.* 'by'"):
        make_control("halve", buy=1)
