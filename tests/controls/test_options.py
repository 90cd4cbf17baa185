import dataclasses

import pytest
from trl import GRPOConfig

from opefo_trl import OPEFOConfig
from opefo_trl.controls import make_control
from opefo_trl.controls.options import CONTROL_FIELDS, RUN_FIELDS, boolean, choice, number


def test_options_from_the_configuration_are_fields_of_it():
    assert set(RUN_FIELDS) <= {field.name for field in dataclasses.fields(GRPOConfig)}
    assert set(CONTROL_FIELDS) <= {field.name for field in dataclasses.fields(OPEFOConfig)}


@pytest.mark.parametrize(
    "check", [lambda: number("x", -1, 0), lambda: choice("x", -1, "ab"), lambda: boolean("x", -1)]
)
def test_a_wrong_option_is_refused_as_one_of_control_kwargs(check):
    with pytest.raises(ValueError, match="`x=-1` in `control_kwargs`"):
        check()


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert make_control("adaptive_entropy", coef_max="5e-3").presets["entropy_coef_max"] == 0.005
    bapo = make_control("bapo", low="6e-1", low_end="7e-1", high="1.2e0", high_end="1.3e0")
    assert bapo.lows == [0.6, 0.65, 0.7] and bapo.highs == [1.2, 1.25, 1.3]
