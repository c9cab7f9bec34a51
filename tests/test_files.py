"""A file is there whole or not at all."""

from pathlib import Path

import pytest

from medvlm_harness.files import plain_name, replacing, write_whole


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    with pytest.raises(RuntimeError, match="full"), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_part_of_a_path_stays_one() -> None:
    assert plain_name("../../etc/passwd") == "etc-passwd"
    assert plain_name("/") == "unnamed"
    assert plain_name("a" * 300) == "a" * 80
