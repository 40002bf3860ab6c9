"""Files appear whole or not at all, and whatever is wrong with one is said in one line."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tdmpc2.errors import ConfigError, DataError, FileError
from tdmpc2.files import (
    atomic_write,
    difference,
    exists,
    flat,
    in_order,
    in_use,
    read_bytes,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_what_may_be_read_by_whom_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"format": "a"})
    finally:
        os.umask(before)
    for name in ("a.json", "a.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, denied: Any) -> None:
    write_json(tmp_path / "a.json", 1)
    write_tensors(tmp_path / "a.safetensors", {}, {"format": "a"})
    denied(tmp_path)
    with pytest.raises(FileError, match=r"a\.json cannot be read: Permission denied"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileError, match=r"a\.safetensors cannot be read: Permission denied"):
        read_tensors(tmp_path / "a.safetensors", "a", "again", DataError)


def test_a_folder_that_may_not_be_entered_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    assert not exists("no/where")
    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(FileError, match="no/where cannot be read: Permission denied"):
        exists("no/where")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileError, match="is not a regular file"):
            read_bytes(path)
    with pytest.raises(FileError, match="null"):
        read_bytes("a\0b")
    with pytest.raises(FileError, match="too long"):
        read_bytes("a" * 300)


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="damaged"):
        read_json(tmp_path / "a.json")


TENSORS = {
    "floats": torch.tensor([[1.0, -2.0], [float("nan"), 0.0]]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "step": torch.tensor(7),
    "none": torch.zeros(0, 4),
}


def test_tensors_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    path, about = tmp_path / "a.safetensors", {"format": "a-1", "sizes": {2: "b", 10: [1.5, None]}, "t": (1,)}
    write_tensors(path, {**TENSORS, "turned": torch.arange(6).view(2, 3).T}, about)
    tensors, read = read_tensors(path, "a-1", "again", DataError)
    assert read == {"format": "a-1", "sizes": {"2": "b", "10": [1.5, None]}, "t": [1]}
    assert tensors.pop("turned").tolist() == [[0, 3], [1, 4], [2, 5]]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].nan_to_num(9), tensor.nan_to_num(9))


def test_every_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"format": "a-1", "seeds": [3, 4]})
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match="make it again") as caught:
            read_tensors(path, "a-1", "make it again", DataError)
        assert "\n" not in str(caught.value)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged"):
            read_tensors(path, "a-1", "again", DataError)


def test_files_of_other_formats_and_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    deep = "[" * 300 + "]" * 300
    for content, message in (
        ('{"format": "a-2"}', "'a-2', not 'a-1': make it again"),
        ('{"version": 1}', "damaged or something else: make it again"),
        ("[]", "damaged"),
        ('{"format": "a-1", "digest": "0"}', "contents have changed"),
        (f'{{"format": "a-1", "deep": {deep}}}', "damaged"),
    ):
        save_file({}, path, metadata={"tdmpc2": content})
        for bare in (False, True):
            with pytest.raises(DataError, match=message):
                read_tensors(path, "a-1", "make it again", DataError, bare=bare)
    save_file(TENSORS, path)
    with pytest.raises(DataError, match="something else"):
        read_tensors(path, "a-1", "again", DataError)
    tensors, about = read_tensors(path, "a-1", "again", DataError, bare=True)
    assert about == {} and tensors.keys() == TENSORS.keys()


def in_another_process(folder: Path, then: Any) -> int:
    """Fork a process that takes `folder` and calls `then`; its status is 3 where the folder is in use."""
    if pid := os.fork():
        return pid
    status = 9
    try:
        with in_use(folder):
            then()
        status = 0
    except ConfigError as e:
        status = 3 if "is in use by another process" in str(e) else 4
    finally:
        os._exit(status)


def test_one_process_at_a_time_is_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"

    def status(pid: int) -> int:
        return os.waitpid(pid, 0)[1]

    with in_use(folder):
        assert os.waitstatus_to_exitcode(status(in_another_process(folder, lambda: None))) == 3
    assert status(in_another_process(folder, lambda: None)) == 0
    holder = in_another_process(folder, lambda: ((folder / "held").touch(), time.sleep(60)))
    while not (folder / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="in use"), in_use(folder):
        pass
    os.kill(holder, signal.SIGKILL)
    status(holder)
    with in_use(folder):  # a killed process leaves nothing that is in the way
        pass


def test_numbers_in_names_are_counted():
    names = ["data/teacher", "data/round-1", "data/round-2", "data/round-10", "data/round-11/a"]
    assert [str(p) for p in in_order(map(Path, sorted(names)))] == [*names[1:], names[0]]


@pytest.mark.parametrize(
    ("earlier", "words"),
    [
        ({"planner": {"horizon": 3, "sizes": [1, 2]}, "device": "cuda", "seed": 1}, ""),
        ({"planner": {"horizon": 4, "sizes": [1, 2]}, "seed": 1}, "planner.horizon=4, not 3"),
        ({"planner": {"horizon": 3}, "seed": 1}, "planner.sizes=null, not [1, 2]"),
        ({"planner": {"horizon": 3, "sizes": [1, 2]}, "seed": 2}, "seed=2, not 1"),
        ({"horizon": 3, "seed": 1}, "horizon=3, which is no longer a setting"),
        ([1], "no settings at all"),
    ],
)
def test_a_difference_names_the_setting_as_it_is_typed(earlier: Any, words: str) -> None:
    now = {"planner": {"horizon": 3, "sizes": (1, 2)}, "device": "cpu", "seed": 1}
    assert difference(earlier, now, free=["device"]) == words
    assert flat(now) == {"planner.horizon": 3, "planner.sizes": (1, 2), "device": "cpu", "seed": 1}
