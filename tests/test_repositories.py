import pytest

from opefo_trl.repositories import check_repo_id, is_repository


@pytest.mark.parametrize("name", ["user/model", "model", "user/model.name-1"])
def test_names_that_the_hub_accepts_are_returned(name):
    assert check_repo_id(name) == name


@pytest.mark.parametrize("name", ["a/b/c", "user/mo del", "-x", "", "user/model.git"])
def test_other_names_are_refused_with_the_field_to_set(name):
    with pytest.raises(ValueError) as refused:
        check_repo_id(name)
    assert f"`hub_model_id={name!r}`" in str(refused.value) and "USER/NAME" in str(refused.value)
    with pytest.raises(ValueError, match="^--repo 'x' .*USER/NAME"):
        check_repo_id(name, "--repo 'x'")


def test_a_repository_is_told_from_files_and_other_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "run").mkdir(parents=True)
    assert is_repository("user/model")
    for other in ("out/run", "user/curves.parquet", "model", "a/b/c", tmp_path, None):
        assert not is_repository(other), other
