import threading
from pathlib import Path

import pytest

from batchgen.errors import ModelError
from batchgen.models.string_map import read_string_map, update_string_map


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fetched.json"


def test_a_missing_file_is_an_empty_map(path: Path) -> None:
    assert read_string_map(path) == {}


def test_an_update_changes_and_adds_entries_and_leaves_one_file(path: Path) -> None:
    update_string_map(path, {"a": "1", "b": "2"})
    update_string_map(path, {"b": "3", "c": "4"})
    assert read_string_map(path) == {"a": "1", "b": "3", "c": "4"}
    assert list(path.parent.iterdir()) == [path]


def test_parallel_updates_keep_every_entry(path: Path) -> None:
    threads = [threading.Thread(target=update_string_map, args=(path, {str(i): "x"})) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_string_map(path)) == 20


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "[" * 60_000])
def test_a_file_that_is_not_an_object_of_strings_is_refused(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ModelError, match="fetched.json: "):
        read_string_map(path)


def test_a_full_disk_gives_an_error_without_the_name_of_a_temporary_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    update_string_map(path, {"a": "1"})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelError) as caught:
        update_string_map(path, {"a": "2"})
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert read_string_map(path) == {"a": "1"}
    assert list(path.parent.iterdir()) == [path]
