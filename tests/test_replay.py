"""The replay buffer: slices stay inside episodes, are uniform, and survive the way to the disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tdmpc2.errors import DataError, TDMPC2Error
from tdmpc2.files import write_tensors
from tdmpc2.training.replay import Episode, Replay

HORIZON = 3
LIKE = Episode(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))


def episode(number: int, steps: int, terminated: bool = False) -> Episode:
    """Every entry tells the episode's number and its own step."""
    t = torch.arange(steps + 1, dtype=torch.float32)
    marks = torch.stack([torch.full_like(t, number), t], 1)
    ends = torch.zeros(steps)
    ends[-1] = float(terminated)
    return Episode(marks, marks[:-1].clone(), 1000.0 * number + t[:-1], ends)


def filled(lengths: list[int], capacity: int, horizon: int = HORIZON) -> Replay:
    """Episodes of these lengths; the even ones terminate if they are long enough for a slice."""
    replay = Replay(capacity, horizon, seed=0)
    for number, steps in enumerate(lengths):
        replay.add(episode(number, steps, terminated=number % 2 == 0 and steps >= horizon))
    return replay


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("capacity", [1000, 37])  # 37: the ring wraps in the middle of episodes
def test_slices_lie_within_one_episode(capacity: int) -> None:
    lengths = [5, 3, 12, 7, 2, 9, 10, 4]
    replay = filled(lengths, capacity)
    assert len(replay) <= capacity
    batch = replay.sample(2000)
    number, t = batch.obs.unbind(-1)  # [H+1, B] each
    assert (number == number[0]).all(), "a slice crosses the end of an episode"
    assert (t == t[0] + torch.arange(HORIZON + 1.0)[:, None]).all()
    assert torch.equal(batch.action, batch.obs[:-1])
    assert torch.equal(batch.reward, 1000 * number[:-1] + t[:-1])
    length = torch.tensor(lengths)[number.long()]
    last = (t[1:] == length[1:]) & (number[1:] % 2 == 0)
    assert torch.equal(batch.terminated.bool(), last)
    for column in batch:
        assert column.is_contiguous() and column.shape[1] == 2000

    # All slices of all episodes that are held, equally often.
    held = range(len(lengths) - len(replay._starts), len(lengths))
    expected = {(n, s) for n in held for s in range(lengths[n] - HORIZON + 1)}
    assert replay.num_slices == len(expected)
    drawn = list(zip(number[0].int().tolist(), t[0].int().tolist(), strict=True))
    assert set(drawn) == expected
    counts = torch.tensor([drawn.count(slice_) for slice_ in expected]) * len(expected) / 2000
    assert counts.min() > 0.4 and counts.max() < 1.8


def test_oldest_episodes_make_room() -> None:
    replay = filled([9] * 5, capacity=34)  # 10 rows each
    assert len(replay) == 30
    assert set(replay.sample(500).obs[0, :, 0].tolist()) == {2, 3, 4}
    with pytest.raises(DataError, match="buffer_size=34"):
        replay.add(episode(9, 34))


def test_memory_grows_as_it_is_filled() -> None:
    replay = Replay(1_000_000, HORIZON, seed=0)
    for number in range(12):
        replay.add(episode(number, 999))
    assert replay._rows is not None and 12_000 <= len(replay._rows.obs) <= 24_000
    assert set(replay.sample(500).obs[0, :, 0].tolist()) == set(range(12))


def test_failures_within_the_horizon_are_drawn_and_what_is_cut_off_there_is_not() -> None:
    replay = Replay(100, HORIZON, seed=0)
    replay.add(episode(0, 2))  # cut off
    replay.add(episode(1, 1, terminated=True))
    replay.add(episode(2, 2, terminated=True))
    replay.add(episode(3, 3, terminated=True))
    assert replay.num_slices == 3
    batch = replay.sample(300)
    for number, steps in ((1, 1), (2, 2), (3, 3)):
        (rows,) = torch.where(batch.obs[0, :, 0] == number)
        assert len(rows) > 50
        obs, action, reward, terminated = (column[:, rows[0]] for column in batch)
        real = episode(number, steps, terminated=True)
        assert torch.equal(obs[: steps + 1], real.obs) and (obs[steps:] == real.obs[-1]).all()
        assert torch.equal(action[:steps], real.action) and not action[steps:].any()
        assert torch.equal(reward[:steps], real.reward) and not reward[steps:].any()
        assert terminated.tolist() == [0.0] * (steps - 1) + [1.0] * (HORIZON - steps + 1)
    assert not (batch.obs[..., 0] == 0).any()


def test_short_failures_change_nothing_for_other_episodes() -> None:
    """Without them, samples are those of a buffer that does not pad."""
    replay = filled([5, 1, 12, 2, 3], capacity=100)  # 1 and 2 steps: cut off
    pick = torch.randint(3 + 10 + 1, (64,), generator=torch.Generator().manual_seed(0))
    first = [(0, s) for s in range(3)] + [(2, s) for s in range(10)] + [(4, 0)]
    expected = torch.tensor([first[i] for i in pick.tolist()], dtype=torch.float32)
    assert torch.equal(replay.sample(64).obs[0], expected)


@pytest.mark.parametrize("capacity", [1000, 37])
def test_shards_bring_back_the_same_buffer(tmp_path: Path, capacity: int) -> None:
    replay, since = Replay(capacity, HORIZON, seed=0), 0
    for number, steps in enumerate([5, 3, 12, 7, 2, 9, 10, 4]):
        replay.add(episode(number, steps))
        if number % 2:
            replay.save(tmp_path, since)
            since = replay.end
            replay.forget(tmp_path)
    replay.save(tmp_path, since)  # nothing new: writes nothing
    assert len(names(tmp_path)) == (4 if capacity == 1000 else 3)
    first, end, state = replay.first, replay.end, replay.generator.get_state()
    expected = replay.sample(300)

    replay.add(episode(8, 6))  # after the checkpoint, and lost
    replay.save(tmp_path, end)
    (tmp_path / "notes.safetensors").write_text("not ours")
    again = Replay(capacity, HORIZON, seed=1)
    again.load(tmp_path, first, end, LIKE)
    again.generator.set_state(state)
    for a, b in zip(again.sample(300), expected, strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / f"{end:012d}.safetensors").exists()


@pytest.mark.parametrize("capacity", [1000, 20])  # 20: smaller than a shard
def test_a_shard_grows_until_the_next_one_begins(tmp_path: Path, capacity: int) -> None:
    """A buffer is brought back from any moment, though its shard grew after it; and shards do not tell when
    they were written."""

    def run(folder: Path, writes: list[int]) -> list[tuple[int, int]]:
        replay, since, bounds = Replay(capacity, HORIZON, seed=0), 0, []
        for number in range(10):
            replay.add(episode(number, 4 + number % 3))
            if number in writes or number in (4, 9):
                replay.save(folder, since)
                bounds.append((replay.first, replay.end))
                # A kill here leaves the shard of a checkpoint that was not written.
                for first, end in bounds[-2:]:
                    copy = folder.parent / f"{folder.name}-copy"
                    shutil.copytree(folder, copy)
                    again = Replay(capacity, HORIZON, seed=0)
                    again.load(copy, first, end, LIKE)
                    assert (again.first, again.end) == (first, end)
                    shutil.rmtree(copy)
                replay.forget(folder)
            since = replay.end if number == 4 else since
        return bounds

    run(tmp_path / "often", list(range(10)))
    run(tmp_path / "seldom", [])
    assert names(tmp_path / "often") == names(tmp_path / "seldom")
    for name in names(tmp_path / "often"):
        assert (tmp_path / "often" / name).read_bytes() == (tmp_path / "seldom" / name).read_bytes()


def test_missing_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    replay = Replay(100, HORIZON, seed=0)
    for number in range(3):  # 10 rows each
        replay.add(episode(number, 9))
        replay.save(tmp_path / "whole", 10 * number)

    def refused(damage: Callable[[Path], object], message: str) -> None:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder)
        with pytest.raises(TDMPC2Error, match=message) as e:
            Replay(100, HORIZON, seed=0).load(folder, 0, 30, LIKE)
        assert "\n" not in str(e.value)
        shutil.rmtree(folder)

    def flip(folder: Path) -> None:
        content = bytearray((folder / middle).read_bytes())
        content[-100] ^= 1
        (folder / middle).write_bytes(content)

    def rewrite(**changes: torch.Tensor) -> Callable[[Path], None]:
        good = {**episode(1, 9)._asdict(), "lengths": torch.tensor([10])}
        good |= {
            name: torch.cat([good[name], good[name][-1:]]) for name in ("action", "reward", "terminated")
        }
        return lambda folder: write_tensors(folder / middle, good | changes, {"format": "tdmpc2-replay-1"})

    middle = "000000000010.safetensors"
    for name in names(tmp_path / "whole"):
        refused(lambda folder, name=name: (folder / name).unlink(), "rows 0 to 30 are incomplete")
    refused(lambda folder: (folder / middle).write_bytes((folder / middle).read_bytes()[:-20]), "damaged")
    refused(flip, "its contents have changed")
    refused(lambda folder: save_file({"obs": torch.zeros(1)}, folder / middle), "damaged or something else")
    refused(rewrite(obs=torch.zeros(10, 3)), r"has obs as torch.float32 \[3\], the environment has .* \[2\]")
    refused(rewrite(action=torch.zeros(10, 2).double()), "has action as torch.float64")
    refused(rewrite(lengths=torch.tensor([4])), "does not contain episodes")
    refused(rewrite(lengths=torch.tensor([9, 1])), "does not contain episodes")
    refused(rewrite(lengths=torch.tensor(2.5)), "does not contain episodes")
    rewrite()(tmp_path / "whole")  # what is written alike is accepted
    Replay(100, HORIZON, seed=0).load(tmp_path / "whole", 0, 30, LIKE)


def test_pixels_stay_bytes() -> None:
    replay = Replay(50, HORIZON, seed=0)
    images = torch.randint(0, 256, (11, 9, 64, 64), dtype=torch.uint8)
    replay.add(Episode(images, torch.zeros(10, 2), torch.arange(10.0), torch.zeros(10)))
    batch = replay.sample(4)
    assert batch.obs.dtype == torch.uint8 and batch.obs.shape == (4, 4, 9, 64, 64)
    first = batch.reward[0].long()
    assert torch.equal(batch.obs[2], images[first + 2])


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    """A shard's own name is never written again, so no later write would delete it."""
    replay = filled([5, 5], 100)
    replay.save(tmp_path, 0)
    shards = names(tmp_path)
    (tmp_path / ".000000000012.safetensors.0123456789ab.tmp").write_bytes(b"half")
    Replay(100, HORIZON, seed=0).load(tmp_path, 0, 12, LIKE)
    assert names(tmp_path) == shards
