import pytest
from control_inputs import tokens_of

from opefo_trl.controls import CONTROLS, Control, make_control


def test_flags_are_reset_in_a_subclass_that_overrides_the_methods_they_describe():
    class Bonus(CONTROLS["opefo"]):
        def penalty(self, tokens):
            return -tokens.entropies

    class Relabelled(CONTROLS["opefo"]):
        def metrics(self):
            return {}

    class Clip(CONTROLS["opefo"]):
        def clip_range(self, tokens):
            return 0.1, 0.3

    class Declared(Bonus):
        by_row = True

    class Mixed(type("Mixin", (), {"advantages": lambda self, tokens: tokens.entropies}), CONTROLS["opefo"]):
        pass

    def flags(control):
        return control.by_row, control.keeps_zeros

    assert flags(CONTROLS["none"]) == flags(CONTROLS["opefo"]) == flags(Relabelled) == (True, True)
    assert flags(Bonus) == flags(Mixed) == (False, False)
    assert flags(Clip) == (False, True) and flags(Declared) == (True, False)
    assert Clip().uses_clip_range


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
