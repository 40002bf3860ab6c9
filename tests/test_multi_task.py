"""One task of a multi-task checkpoint, from the file to an accelerated agent and its episodes."""

from pathlib import Path

import pytest
import torch

import tdmpc2
from tdmpc2.accelerate import save_agent
from tdmpc2.agent import Kind, SpeculativeAgent
from tdmpc2.config import EAGER, TEACHER, BudgetOverride, SpeculationConfig
from tdmpc2.distillation import CorrectorTrainConfig, collect, load_shards, train_corrector
from tdmpc2.distillation.dataset import read_shard
from tdmpc2.envs import dmc
from tdmpc2.evaluation.runs import Subject
from tdmpc2.files import write_json
from tdmpc2.teacher import open_teacher
from tdmpc2.world_model import fingerprint

CHECKPOINT = Path(__file__).parent / "fixtures/official/mt30_small.pt"
TASK, INDEX, OBS, ACTION = "cup-catch", 12, 8, 2  # of 24 observations and 6 actions
STEPS = 6  # of an episode
BUDGET = BudgetOverride(num_samples=16, iterations=2, num_elites=4, num_pi_trajs=4, compile=False)
MODE = SpeculationConfig(
    execution_horizon=5, corrector="two_tower", refine_steps=1
)  # two steps past the plan


@torch.no_grad()
def test_from_a_multi_task_checkpoint_to_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmc, "EPISODE_STEPS", STEPS)
    teacher = open_teacher(TASK, str(CHECKPOINT), BUDGET)
    model, task = teacher.model, torch.tensor(INDEX)
    assert teacher.task_index == INDEX

    naive = SpeculationConfig(execution_horizon=5)
    shards = collect(teacher, tmp_path / "data", episodes=4, num_envs=2, behaviours=[TEACHER, naive])
    for path in shards:
        tensors, header = read_shard(path, teacher.fingerprint)
        assert header["task_index"] == INDEX
        assert (tensors["plan"][..., ACTION:] == 0).all() and (tensors["plan"][..., :ACTION] != 0).any()
    data = load_shards(tmp_path / "data", teacher.fingerprint)
    assert len(data.latent) == 4 * STEPS and data.task == INDEX
    first, _ = teacher.env().reset(seed=0)
    assert first.shape == (24,) and (first[:OBS] != 0).any() and (first[OBS:] == 0).all()
    torch.testing.assert_close(data.latent[0], model.encode(torch.from_numpy(first), task))

    config = CorrectorTrainConfig(
        architecture="two_tower", updates=2, batch_size=4, rollout_steps=4, validate_every=1, width=32
    )
    with torch.enable_grad():
        trained = train_corrector(model, data, config, tmp_path / "correctors")["two_tower"]
    of_test = slice(1, STEPS)  # the episode with seed 0, after its first step
    prior = model.prior(data.latent[of_test], task) - data.teacher_action[of_test]
    assert trained.errors.prior[0] == pytest.approx(float(prior.abs().sum(-1).mean()), rel=1e-5)

    write_json(tmp_path / "settings.json", {"correctors": {"two_tower": fingerprint(trained.corrector)}})
    write_json(tmp_path / "chosen.json", {"mode": "two_tower_5_refined", "speculation": vars(MODE)})
    save_agent(tmp_path / "agent", teacher, tmp_path, tmp_path / "correctors")
    agent = tdmpc2.load_agent(tmp_path / "agent", compute=EAGER)
    expected = SpeculativeAgent(teacher.agent(), MODE, trained.corrector)
    env, kinds = teacher.env(), []
    obs, _ = env.reset(seed=9)
    for _ in range(STEPS):
        action = agent.act(obs)
        assert (action == expected.act(obs)).all()
        assert (action[ACTION:] == 0).all() and (action[:ACTION] != 0).all()
        kinds.append(Kind(int(agent.info.kind)))
        obs, _, terminated, truncated, _ = env.step(action)
    assert kinds == [Kind.PLANNED, *[Kind.CORRECTED] * 4, Kind.PLANNED] and truncated and not terminated

    episodes, steps = Subject(teacher, {"two_tower": trained.corrector}).rollout(MODE, [20, 21, 22], 2)
    assert episodes["length"].tolist() == [STEPS] * 3 and steps["mismatch"].notna().sum() == 3 * 4
