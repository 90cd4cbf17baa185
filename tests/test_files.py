import pytest

from opefo_trl.files import write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_whole(path, lambda part: part.write_text("old"))

    def die(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, die)
    assert path.read_text() == "old"
    write_whole(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["file.txt"]
