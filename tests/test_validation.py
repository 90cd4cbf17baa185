import pytest

from opefo_trl.validation import check_bool, check_choice, check_number, did_you_mean


def test_right_values_are_returned():
    assert check_choice("x", "b", ["a", "b"]) == "b" and check_bool("x", False) is False
    assert check_number("x", "1e-3", 0, 1) == 0.001 and check_number("x", 1, 0, 1) == 1.0


@pytest.mark.parametrize("value", ["bb", 1, None, ["b"], True])
def test_a_wrong_choice_names_field_value_and_choices(value):
    with pytest.raises(ValueError) as refused:
        check_choice("x", value, ["aa", "bbb"], where=" of y", otherwise=", or c")
    assert f"`x={value!r}` of y" in str(refused.value) and "'aa', 'bbb', or c" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "bounds", "allowed"),
    [
        (2, {"low": 0, "high": 1}, "in [0, 1]"),
        (-1, {"low": 0}, "at least 0"),
        (2, {"high": 1}, "at most 1"),
        (0, {"above": 0}, "above 0"),
        (2, {"above": 0, "high": 1}, "above 0 and at most 1"),
        ("much", {}, "a number"),
        (True, {}, "a number"),
        (None, {}, "a number"),
        (float("nan"), {}, "a number"),
    ],
)
def test_a_wrong_number_names_field_value_and_bounds(value, bounds, allowed):
    with pytest.raises(ValueError) as refused:
        check_number("x", value, **bounds, where=" of y", why="For a reason.")
    assert all(part in str(refused.value) for part in (f"`x={value!r}` of y", allowed, "For a reason."))


@pytest.mark.parametrize("value", ["false", 0, None])
def test_only_true_and_false_are_switches(value):
    with pytest.raises(ValueError, match=f"`x={value!r}`.*True or False"):
        check_bool("x", value)


def test_a_near_name_is_suggested_and_a_far_one_is_not():
    assert "'opefo'" in did_you_mean("OPFEO", ["none", "opefo"]) and did_you_mean("xyz", ["none"]) == ""
