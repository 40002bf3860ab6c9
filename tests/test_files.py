"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tdmpc2.errors import CheckpointError, DataError, FileError
from tdmpc2.files import atomic_write, in_order, read_json, read_metadata, write_json

ROOT = Path(__file__).parents[1]


def test_content_appears_at_the_end_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_write(path) as tmp:
        assert tmp.parent == path.parent
        tmp.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["a.bin"]


def test_failure_keeps_what_was_there_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="disk"), atomic_write(path) as tmp:
        tmp.write_bytes(b"ha")
        raise RuntimeError("disk full")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_content_without_json_form_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_killed_writer_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "before")
    script = (
        "import os, signal, sys; from tdmpc2.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as tmp:\n"
        "    tmp.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert read_json(path) == "before"
    (left,) = tmp_path.glob(".a.json.*.tmp")
    write_json(path, "another, which may still be at work on it")
    assert left.exists()
    os.utime(left, (0, 0))
    write_json(path, "after")
    assert read_json(path) == "after"
    assert os.listdir(tmp_path) == ["a.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(content=JSON)
def test_json_round_trip(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, content)
    assert read_json(path) == content


@pytest.mark.parametrize("damaged", [b"", b'{"a": 1', b"\xff\xfe\x00"])
def test_damaged_json_is_one_line_naming_the_file(tmp_path, damaged):
    path = tmp_path / "a.json"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.json is damaged") as e:
        read_json(path)
    assert "\n" not in str(e.value)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(FileError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_metadata_of_this_format_alone_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for content, message in (
        ('{"format": "a-2"}', "'a-2', expected is 'a-1': make it again"),
        ('{"version": 1}', "damaged or something else: make it again"),
        ("[]", "damaged"),
    ):
        save_file({}, path, metadata={"key": content})
        with pytest.raises(CheckpointError, match=message):
            read_metadata(path, "key", "a-1", "make it again")
    save_file({}, path, metadata={"key": '{"format": "a-1", "n": 1}'})
    assert read_metadata(path, "key", "a-1", "make it again") == {"format": "a-1", "n": 1}


def test_numbers_in_names_are_counted():
    names = ["data/teacher", "data/round-1", "data/round-2", "data/round-10", "data/round-11/a"]
    assert [str(p) for p in in_order(map(Path, sorted(names)))] == [*names[1:], names[0]]
