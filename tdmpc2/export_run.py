"""A TD-MPC2 agent that acts with ONNX Runtime: this file needs NumPy and nothing of the project.

    pip install numpy onnxruntime
    python run.py                      repeat the recorded steps of check.npz, and take the time
    python run.py observations.npy     act on your own observations [T, ...]; writes actions.npy [T, A]

In your own loop:

    agent = Agent("this/folder")
    agent.reset()                      # when an episode begins
    action = agent.act(observation)    # once a step; each entry is in [-1, 1]

How it acts. The agent makes a plan: actions for the next few steps. It executes several steps of it before
it makes the next plan (the execution horizon). At each step a world model turns the observation into a latent
(a vector), and predicts the next one. The distance of the real latent to the predicted one is the mismatch. A
small network, the corrector, changes the planned action to fit the real latent. If the mismatch is too large,
the plan no longer fits, and the agent makes a new plan at once.

What your loop must do is in manifest.json, under "observation" and "action": the order of entries, the
scaling of actions, and how long an action is held. All shapes there are without a batch axis.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Agent:
    """Acts for one robot.

    Args:
        folder: holds manifest.json and the graphs.
        threads: that a graph may use; one is best if other programs need the processor.
        seed: of the noise with which plans are searched.
    """

    def __init__(self, folder: str | Path = ".", threads: int = 1, seed: int = 0) -> None:
        folder = Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest["format"] != "tdmpc2-onnx-1":
            raise ValueError(f"{folder} has format {self.manifest['format']}: use the run.py beside it")
        self.planner = self.manifest["planner"]  # the settings of planning, by name
        self.shape = tuple(self.manifest["observation"]["shape"])
        self.dtype = np.dtype(self.manifest["observation"]["dtype"])

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions: dict[str, Any] = {}
        self.inputs: dict[str, dict[str, Any]] = {}  # by graph and name: dtype, shape, meaning
        self.outputs: dict[str, list[str]] = {}
        for file, graph in self.manifest["graphs"].items():
            name = file.removesuffix(".onnx")
            self.sessions[name] = onnxruntime.InferenceSession(
                str(folder / file), options, providers=["CPUExecutionProvider"]
            )
            self.inputs[name] = {port["name"]: port for port in graph["inputs"]}
            self.outputs[name] = [port["name"] for port in graph["outputs"]]
        self.rng = np.random.default_rng(seed)
        self.draw = self.random_noise  # check() replaces it with recorded noise
        self.reset()

    def reset(self) -> None:
        """Begin an episode: no plan, no history."""
        # The state goes into step.onnx as inputs with an initial value, and comes out as `next_...`.
        self.state = {
            name: np.full(port["shape"], port["initial"], port["dtype"])
            for name, port in self.inputs["step"].items()
            if "initial" in port
        }
        self.last_mean: np.ndarray | None = None  # of the last plan; the next search begins from it
        self.info: dict[str, Any] = {}

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action for an observation, each entry in [-1, 1].

        Raises ValueError if the observation has another shape or is not finite; the agent is unchanged.
        `info` then says whether a plan was made, the step in plan, and the mismatch.
        """
        obs = np.asarray(obs, self.dtype)
        if obs.shape != self.shape:
            raise ValueError(f"the observation has shape {obs.shape}, this agent takes {self.shape}")
        k = int(self.state["k"])  # step in plan; the execution horizon after reset()
        due = k >= self.manifest["execution_horizon"]  # a new plan is due; always so after reset()
        makes_plans = self.manifest["plans"]  # False: the agent acts by the policy alone

        # A first call encodes the observation and compares it with the prediction. If no plan is needed, its
        # action is the one to execute. Otherwise, only its latent `z` is used. An agent that never plans sets
        # `new` at once where a plan would be due.
        step = self.run("step", obs=obs, new=due and not makes_plans)
        if not np.isfinite(step["z"]).all():
            raise ValueError("the observation is not finite or too large: check the sensors")
        needed = due or bool(step["given_up"])
        if needed:
            plan = self.plan(step["z"], k) if makes_plans else None
            if makes_plans or not due:
                step = self.run("step", obs=obs, new=True, new_plan=plan)

        self.state = {name: step["next_" + name] for name in self.state}
        mismatch = float("nan") if due else float(step["mismatch"])
        self.info = {"planned": needed and makes_plans, "k": 0 if needed else k, "mismatch": mismatch}
        return step["action"]

    def plan(self, z: np.ndarray, executed: int) -> np.ndarray:
        """A plan [H, A] from the latent `z`, by model predictive path integral control (MPPI).

        MPPI samples many action sequences from a Gaussian, predicts the return of each with the world model,
        and moves the Gaussian to the best ones (the elites). A few iterations of this make a plan. Fewer are
        faster and worse: the loop may end early, after one iteration or more.
        """
        p, noise = self.planner, self.draw()
        # The search begins from the last plan, without the steps executed since; zeros at its end.
        mean = np.zeros(self.inputs["iteration"]["mean"]["shape"], np.float32)
        if self.last_mean is not None and executed < len(mean):
            mean[: len(mean) - executed] = self.last_mean[executed:]
        std = np.full_like(mean, p["max_std"])
        # Some of the samples follow the policy, a network that acts well without planning.
        prior = None
        if "prior" in self.sessions:
            prior = self.run("prior", z=z, prior_noise=noise["prior_noise"])["prior"]
        for i in range(p["iterations"]):
            found = self.run(
                "iteration",
                z=z,
                mean=mean,
                std=std,
                prior=prior,
                noise=noise["noise"][i],
                value_noise=noise["value_noise"][i],
                heads=noise["heads"][i],
            )
            mean, std = found["next_mean"], found["next_std"]
        self.last_mean = mean
        # The plan is the Gaussian's mean. If at most one step of the last plan was executed, as in an agent
        # that plans at every step, the first action is that of one elite, drawn by score (the Gumbel trick):
        # this breaks ties between equally good plans.
        plan = mean.copy()
        if executed <= 1:
            with np.errstate(divide="ignore"):  # a score of zero is never drawn
                drawn = np.argmax(np.log(found["score"]) + noise["gumbel"])
            plan[0] = np.clip(found["elites"][0, drawn], -1, 1)  # elites: [H, E, A]
        return plan

    def random_noise(self) -> dict[str, Any]:
        """All noise of one plan; any generator will do. Gumbel noise is -log(-log(uniform))."""
        p, size = self.planner, self.inputs["iteration"]["mean"]["shape"][1]
        horizon, iterations, samples = p["horizon"], p["iterations"], p["num_samples"]
        prior, others = p["num_pi_trajs"], samples - p["num_pi_trajs"]
        normal = self.rng.standard_normal
        return {
            "prior_noise": normal((horizon, prior, size), np.float32),
            "noise": normal((iterations, horizon, others, size), np.float32),
            "value_noise": normal((iterations, samples, size), np.float32),
            # The value of a sample is the mean of two of the Q heads, which every iteration draws.
            "heads": [self.rng.permutation(self.manifest["num_q"])[:2] for _ in range(iterations)],
            "gumbel": self.rng.gumbel(size=p["num_elites"]),
        }

    def run(self, name: str, **given: Any) -> dict[str, np.ndarray]:
        """Run a graph; its outputs by name. Inputs that it does not have are left out."""
        given = self.state | given if name == "step" else given
        feed = {}
        for key, port in self.inputs[name].items():
            value = given.get(key)
            if value is None:
                assert key == "new_plan", key  # without a new plan, any values do
                value = np.zeros(port["shape"])
            feed[key] = np.ascontiguousarray(value, port["dtype"]).reshape(port["shape"])
        return dict(zip(self.outputs[name], self.sessions[name].run(None, feed), strict=True))


def check(folder: str | Path) -> float:
    """Repeat the recorded steps of the PyTorch agent with its noise.

    Returns the largest difference of an action. It is about 1e-5. A rare larger one is no fault: two samples
    have nearly the same predicted return, and rounding, which is not the same on every processor, decides
    between them.
    """
    agent = Agent(folder)
    with np.load(Path(folder) / "check.npz") as file:
        recorded = {name: file[name] for name in file.files}
    plans = iter(range(len(recorded.get("gumbel", []))))
    names = [name for name in ("prior_noise", "noise", "value_noise", "heads", "gumbel") if name in recorded]

    def next_noise() -> dict[str, Any]:
        i = next(plans, -1)  # it may plan more often only if it acts differently
        return {name: recorded[name][i] for name in names}

    agent.draw = next_noise
    largest = 0.0
    steps = (recorded[name] for name in ("obs", "action", "begins", "planned"))
    for obs, action, begins, planned in zip(*steps, strict=True):
        if begins:
            agent.reset()
        largest = float(np.maximum(largest, np.abs(agent.act(obs) - action).max()))  # NaN stays NaN
        if agent.info["planned"] != planned:  # the plans would no longer get their own noise
            return float("inf")
    return largest


def latency(folder: str | Path, threads: int, plans: int = 20) -> dict[str, tuple[float, float]]:
    """Median and slowest time, in ms, of steps that make a plan and of steps that make none."""
    agent = Agent(folder, threads)
    with np.load(Path(folder) / "check.npz") as file:
        recorded = file["obs"]
    times: dict[str, list[float]] = {"makes no plan": [], "makes a plan": []}
    t = 0
    agent.act(recorded[0])  # the first call prepares memory
    while t < 5000 and (t < 200 or len(times["makes a plan"]) < plans):
        begin = time.perf_counter()
        agent.act(recorded[t % len(recorded)])
        kind = "makes a plan" if agent.info["planned"] else "makes no plan"
        times[kind].append(1000 * (time.perf_counter() - begin))
        t += 1
        if not agent.manifest["plans"] and t >= 200:
            break
    return {kind: (float(np.median(ms)), max(ms)) for kind, ms in times.items() if ms}


def main(arguments: list[str]) -> None:
    folder = Path(__file__).parent
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print(__doc__)
        return
    if not arguments:
        difference = check(folder)
        print(f"largest difference to the PyTorch agent: {difference:.1e}, of actions in [-1, 1]")
        for threads in (1, 2):
            for kind, (median, slowest) in latency(folder, threads).items():
                print(
                    f"{threads} thread{'s' * (threads > 1)}: a step that {kind} takes {median:.2f} ms "
                    f"(median), {slowest:.2f} ms at most"
                )
        return
    agent = Agent(folder)
    observations = np.load(arguments[0])
    actions = np.stack([agent.act(obs) for obs in observations])
    np.save("actions.npy", actions)
    print(f"actions.npy: {len(actions)} actions of {actions.shape[1]} entries")


if __name__ == "__main__":
    main(sys.argv[1:])
