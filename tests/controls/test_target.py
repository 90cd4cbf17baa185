import math

import pytest
import torch

from opefo_trl.controls.target import EntropyTarget, FirstEntropy


@pytest.mark.parametrize(
    ("value", "number", "relative"), [(0.3, 0.3, False), ("3e-1", 0.3, False), (" 0.4x ", 0.4, True), (1, 1.0, False)]
)
def test_a_target_is_in_nats_or_relative(value, number, relative):
    target = EntropyTarget(value)
    assert (target.number, target.relative) == (number, relative)
    assert float(target.at(torch.tensor(2.0), 0, 10)) == pytest.approx(number * (2 if relative else 1))


@pytest.mark.parametrize("value", [-0.1, 0, "0.4y", "1-2x", "half", math.nan, math.inf, True, None])
def test_a_wrong_target_is_refused_by_the_name_it_was_given_as(value):
    with pytest.raises(ValueError, match='"0.4x"') as refused:
        EntropyTarget(value, name="target")
    assert f"`target={value!r}`" in str(refused.value) and "None (command line" not in str(refused.value)
    with pytest.raises(ValueError, match="None .command line: none"):  # which only `flow_target` takes
        EntropyTarget(value)


@pytest.mark.parametrize(("start", "expected"), [("0.5x", 1.0), (0.8, 0.8)])
def test_a_falling_target_may_begin_elsewhere_than_at_the_first_entropy(start, expected):
    target = EntropyTarget(0.4, "linear", start=EntropyTarget(start))
    levels = [float(target.at(torch.tensor(2.0), step, 5)) for step in range(5)]
    assert levels == pytest.approx([expected + (0.4 - expected) * step / 4 for step in range(5)])


def test_the_first_entropy_is_the_first_that_is_a_number():
    first = FirstEntropy()
    assert first.state() is None
    seen = [float(first.record(torch.tensor(value))) for value in (math.nan, 1.5, 0.3)]
    assert math.isnan(seen[0]) and seen[1:] == [1.5, 1.5] and first.state() == 1.5
    restarted = FirstEntropy()
    restarted.load(first.state())
    assert float(restarted.record(torch.tensor(0.2))) == 1.5
