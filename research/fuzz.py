"""Every kind of file that the package reads, damaged in many ways: what does each input end in?

    python research/fuzz.py inputs=10000

A worker process opens one damaged file after another. An input ends in one of these:

    refused    a `TDMPC2Error`, which is one line
    accepted   it opens, and all that it holds is as before
    changed    it opens, and a weight, a number or a setting is another one
    traceback  any other exception
    hang       it takes longer than `LIMIT` seconds
    crash      the worker dies
    executed   code in it ran

`changed` is right for settings only: a number in config.json may be another one that is allowed. The last
line says how often each happened. The exit status is 1 where anything but refused, accepted and changed
settings happened. Inputs of one seed are always the same.
"""

import json
import multiprocessing
import pickle
import random
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tdmpc2 import SpeculativeAgent, TDMPC2Error, cli, load_agent, load_world_model
from tdmpc2.config import EAGER, CorrectorConfig, PlannerConfig, SpeculationConfig
from tdmpc2.corrector import build_corrector, load_corrector, save_corrector
from tdmpc2.distillation.dataset import TENSORS, load_shards, write_shard
from tdmpc2.files import read_tensors, write_tensors
from tdmpc2.training.checkpoint import FORMAT
from tdmpc2.training.replay import Episode, Replay
from tdmpc2.world_model import fingerprint, save_world_model

ROOT = Path(__file__).parents[1]
OFFICIAL = ROOT / "tests/fixtures/official"
LIMIT = 20  # seconds
STRANGE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**70, 1e308, float("nan"), float("inf"), -0.5, "", "x", "\x00", "../../x"),
    *([], {}, [1], ["x"], {"a": 1}, [[]] * 3, "os:system"),
]
FINE = ("refused", "accepted")


@dataclass(frozen=True, kw_only=True)
class FuzzConfig:
    """How many inputs of which kinds."""

    inputs: int = 10_000
    seed: int = 0
    kinds: tuple[str, ...] = ()  # none: all


class Payload:
    """A pickle that leaves a file where it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@dataclass(frozen=True)
class Kind:
    """A kind of file: the folder that it is in, which of its files is damaged, and what opens it."""

    folder: Path
    file: str
    open: Callable[[Path], str]  # all that was read, as a digest
    settings: bool = False  # other values may be allowed


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Small, undamaged examples of every kind below `folder`."""
    state, multi = OFFICIAL / "state_small.pt", OFFICIAL / "mt30_small.pt"
    model = load_world_model(state)
    torch.manual_seed(0)
    sizes = CorrectorConfig(model.config.latent_dim, model.config.action_dim, width=16, num_heads=2)
    mode = SpeculationConfig(3, threshold=(1.0, 2.0), corrector="two_tower")
    agent = folder / "agent"
    budget = PlannerConfig(num_samples=16, iterations=1, num_elites=4, num_pi_trajs=2)
    save_world_model(
        agent, model, task="walker-walk", planner=asdict(budget), discount=0.99, speculation=asdict(mode)
    )
    save_corrector(agent / "correctors/two_tower", build_corrector(sizes), fingerprint(model))
    horizon, action, latent = 3, model.config.action_dim, model.config.latent_dim
    shapes = {
        "latent": (8, latent),
        "plan": (8, horizon, action),
        "drawn": (8, action),
        "action": (8, action),
        "reward": (8,),
    }
    tensors = {name: torch.randn(*shapes[name]) for name in TENSORS if name in shapes}
    tensors["episode_end"] = torch.tensor([0, 0, 0, 1] * 2, dtype=torch.uint8)
    about: dict[str, Any] = {
        "task": "walker-walk",
        "task_index": None,
        "teacher": fingerprint(model),
        "discount": 0.99,
    }
    about |= {"planner": asdict(budget), "behaviours": [], "bursts": False, "seeds": [0, 1]}
    write_shard(folder / "data/shard-00000000.safetensors", tensors, about)
    replay = Replay(100, horizon, 0)
    like = Episode(torch.randn(9, 5), torch.randn(8, 2), torch.randn(8), torch.zeros(8))
    for _ in range(2):
        replay.add(like)
    replay.save(folder / "replay", 0)
    shard = next((folder / "replay").iterdir()).name
    write_tensors(
        folder / "run/checkpoint.safetensors", model.state_dict(), {"format": FORMAT, "loop": {"step": 3}}
    )
    for source in (state, multi, OFFICIAL / "state_small_old_format.pt"):
        (folder / source.stem).mkdir()
        shutil.copy(source, folder / source.stem / "model.pt")

    def acts(path: Path) -> str:
        opened = load_agent(path, compute=EAGER)
        opened.reset()
        action = opened.act(torch.ones(2, 24) if opened.num_envs == 2 else torch.ones(24))
        if not action.isfinite().all():
            return "NaN actions"
        teacher = opened.teacher if isinstance(opened, SpeculativeAgent) else opened
        own = [fingerprint(teacher.model), str(teacher.planner.config), str(teacher.model.config)]
        if isinstance(opened, SpeculativeAgent):
            own.append(f"{opened.config} {opened.corrector and fingerprint(opened.corrector)}")
        return str(own)

    def replays(path: Path) -> str:
        again = Replay(100, horizon, 0)
        again.load(path, 0, 18, like)
        return str([float(x.double().sum()) for x in again.sample(16)])

    def recording(path: Path) -> str:
        return str(
            [
                x.double().sum() if isinstance(x, torch.Tensor) else x
                for x in load_shards(path, fingerprint(model))
            ]
        )

    def trained(path: Path) -> str:
        read, header = read_tensors(path / "checkpoint.safetensors", FORMAT, "again", TDMPC2Error)
        return str([header, *(float(x.double().sum()) for x in read.values())])

    def original(path: Path) -> str:
        return fingerprint(load_world_model(path / "model.pt"))

    def corrects(path: Path) -> str:
        return fingerprint(load_corrector(path / "correctors/two_tower", fingerprint(model)))

    return {
        "config.json": Kind(agent, "config.json", acts, settings=True),
        "model.safetensors": Kind(agent, "model.safetensors", acts),
        "corrector.safetensors": Kind(agent, "correctors/two_tower/corrector.safetensors", corrects),
        "corrector data": Kind(folder / "data", "shard-00000000.safetensors", recording),
        "replay": Kind(folder / "replay", shard, replays),
        "training checkpoint": Kind(folder / "run", "checkpoint.safetensors", trained),
        "original": Kind(folder / state.stem, "model.pt", original),
        "original, old format": Kind(folder / "state_small_old_format", "model.pt", original),
        "original, multi-task": Kind(folder / multi.stem, "model.pt", original),
    }


def damage(raw: bytes, rng: random.Random, witness: Path) -> bytes:
    """The content of a file after one or a few changes."""
    data = bytearray(raw)
    text = raw[:1] == b"{"
    if text and rng.random() < 0.7:
        return strange_json(json.loads(raw), rng)
    if raw[:2] == b"PK" and rng.random() < 0.1:
        return pickled(rng, witness)
    if raw[8:9] == b"{" and rng.random() < 0.3:
        return strange_header(raw, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 64, 4096))
        if rng.random() < 0.3:  # where a file says what it holds
            at = rng.randrange(min(len(data), 2_000))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + size] = rng.randbytes(min(size, len(data) - at))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at : at + size] = bytes(min(size, len(data) - at))
            case 6:
                data[at:at] = rng.randbytes(size)
        if not data:
            break
    return bytes(data)


def strange_json(content: Any, rng: random.Random) -> bytes:
    """JSON with one value, name or level that should not be."""
    at = content
    while True:
        names: Any = list(at) if isinstance(at, dict) else range(len(at))
        if not names:
            break
        name = rng.choice(list(names))
        if isinstance(at[name], dict | list) and at[name] and rng.random() < 0.7:
            at = at[name]
            continue
        match rng.randrange(4):
            case 0 if isinstance(at, dict):
                del at[name]
            case 1 if isinstance(at, dict):
                at[str(name) + "x"] = at.pop(name)
            case _:
                at[name] = rng.choice(STRANGE)
        break
    if rng.random() < 0.02:
        return b"[" * 5_000
    return json.dumps(content).encode()


def strange_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header was written by somebody else."""
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + size])
    except ValueError:
        return raw[:8]
    header = strange_json(header, rng)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def pickled(rng: random.Random, witness: Path) -> bytes:
    """A PyTorch file, or a bare pickle, that carries code."""
    content = pickle.dumps({"model": Payload(witness)})
    if rng.random() < 0.5:
        return content
    path = witness.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3")
    return path.read_bytes()


def work(inbox: Any, outbox: Any, folder: Path) -> None:
    """Open what is asked for until there is nothing left."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    kinds = make_kinds(folder / "worker")
    usual = {name: kind.open(kind.folder) for name, kind in kinds.items()}
    outbox.send("ready")
    while (task := inbox.recv()) is not None:
        name, content = task
        kind, detail = kinds[name], ""
        path = kind.folder / kind.file
        whole = path.read_bytes()
        path.write_bytes(content)
        signal.alarm(LIMIT)
        try:
            found = kind.open(kind.folder)
            end = "accepted" if found == usual[name] else "changed settings" if kind.settings else "changed"
            if found == "NaN actions":
                end, detail = "changed", found
        except TDMPC2Error as e:
            end = "refused" if "\n" not in str(e) else "traceback"
        except TimeoutError:
            end = "hang"
        except BaseException as e:
            end, detail = "traceback", f"{type(e).__name__}: {str(e)[:200]}"
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
        outbox.send((end, detail))


def main(config: FuzzConfig) -> None:
    rng, ends = random.Random(config.seed), Counter[tuple[str, str]]()
    multiprocessing.set_start_method("spawn")
    with TemporaryDirectory() as name:
        folder = Path(name)
        witness = folder / "executed"
        kinds = make_kinds(folder / "whole")
        names = list(config.kinds or kinds)

        def start() -> tuple[Any, Any, Any]:
            shutil.rmtree(folder / "worker", ignore_errors=True)
            (inbox, tell), (hear, outbox) = multiprocessing.Pipe(False), multiprocessing.Pipe(False)
            process = multiprocessing.Process(target=work, args=(inbox, outbox, folder), daemon=True)
            process.start()
            outbox.close()
            assert hear.recv() == "ready"
            return process, tell, hear

        process, tell, hear = start()
        for i in range(config.inputs):
            kind = names[i % len(names)]
            whole = (kinds[kind].folder / kinds[kind].file).read_bytes()
            content = damage(whole, rng, witness)
            tell.send((kind, content))
            try:
                end, detail = hear.recv() if hear.poll(2 * LIMIT) else ("hang", "does not even stop")
            except EOFError:
                end, detail = "crash", ""
            if content == whole:
                end = "accepted"
            if witness.exists():
                end = "executed"
                witness.unlink()
            ends[kind, end] += 1
            if end not in (*FINE, "changed settings"):
                kept = Path(f"fuzz-{config.seed}-{i}")
                kept.write_bytes(content)
                print(f"{kind}: {end} {detail} (kept as {kept})", flush=True)
            if end in ("crash", "hang"):
                process.kill()
                process, tell, hear = start()
            if (i + 1) % 1_000 == 0:
                print(f"{i + 1:,} inputs", file=sys.stderr, flush=True)
        tell.send(None)
        process.join(10)
    for kind in names:
        print(f"{kind:24}", ", ".join(f"{n} {end}" for (k, end), n in sorted(ends.items()) if k == kind))
    total = Counter[str]()
    for (_, end), n in ends.items():
        total[end] += n
    print(f"{total.total():,} inputs: " + ", ".join(f"{n:,} {end}" for end, n in total.most_common()))
    if set(total) - {*FINE, "changed settings"}:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(FuzzConfig, main)
