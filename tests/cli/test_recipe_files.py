import pytest

from opefo_trl.cli.recipe_files import MACHINES, RECIPES, TOP, find_file, names_in


def test_a_name_is_one_of_ours_and_a_path_is_a_file(tmp_path):
    assert (TOP / "train.py").is_file() and "zero3" in names_in(MACHINES)
    assert find_file("config", "quickstart", RECIPES) == RECIPES / "quickstart.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text("a: 1")
    assert find_file("config", str(mine), RECIPES) == mine


def test_another_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"`accelerate_config='zero4'` is no file\. Did you mean .*zero"):
        find_file("accelerate_config", "zero4", MACHINES)
