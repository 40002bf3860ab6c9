"""The replay buffer: slices stay inside episodes, are uniform, and survive the way to the disk."""

from pathlib import Path

import pytest
import torch

from tdmpc2.errors import DataError
from tdmpc2.training.replay import Episode, Replay

HORIZON = 3


def episode(number: int, steps: int, terminated: bool = False) -> Episode:
    """Every entry tells the episode's number and its own step."""
    t = torch.arange(steps + 1, dtype=torch.float32)
    marks = torch.stack([torch.full_like(t, number), t], 1)
    ends = torch.zeros(steps)
    ends[-1] = float(terminated)
    return Episode(marks, marks[:-1].clone(), 1000.0 * number + t[:-1], ends)


def filled(lengths: list[int], capacity: int, horizon: int = HORIZON) -> Replay:
    replay = Replay(capacity, horizon, seed=0)
    for number, steps in enumerate(lengths):
        replay.add(episode(number, steps, terminated=number % 2 == 0))
    return replay


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


def test_episodes_too_short_for_a_slice_are_never_drawn() -> None:
    replay = filled([2, 1, 3], capacity=100)
    assert replay.num_slices == 1
    assert (replay.sample(50).obs[..., 0] == 2).all()


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
    assert len(list(tmp_path.iterdir())) == (4 if capacity == 1000 else 3)
    end, state = replay.end, replay.generator.get_state()
    expected = replay.sample(300)

    replay.add(episode(8, 6))  # after the checkpoint, and lost
    replay.save(tmp_path, end)
    again = Replay(capacity, HORIZON, seed=1)
    again.load(tmp_path, end)
    again.generator.set_state(state)
    for a, b in zip(again.sample(300), expected, strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / f"{end:012d}.safetensors").exists()


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    replay = filled([9, 9], capacity=100)
    replay.save(tmp_path, 0)
    (shard,) = tmp_path.iterdir()
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    with pytest.raises(DataError, match="damaged"):
        Replay(100, HORIZON, seed=0).load(tmp_path, 20)
    shard.unlink()
    with pytest.raises(DataError, match="lacks"):
        Replay(100, HORIZON, seed=0).load(tmp_path, 20)


def test_pixels_stay_bytes() -> None:
    replay = Replay(50, HORIZON, seed=0)
    images = torch.randint(0, 256, (11, 9, 64, 64), dtype=torch.uint8)
    replay.add(Episode(images, torch.zeros(10, 2), torch.arange(10.0), torch.zeros(10)))
    batch = replay.sample(4)
    assert batch.obs.dtype == torch.uint8 and batch.obs.shape == (4, 4, 9, 64, 64)
    first = batch.reward[0].long()
    assert torch.equal(batch.obs[2], images[first + 2])
