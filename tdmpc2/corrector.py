"""Correctors: small networks that turn a planned action into the action that the planner would choose now.

For each of the last `window` steps of an episode, a corrector sees the real latent, the predicted latent, the
planned action and the step in plan. It computes its own action, and a gate in (-1, 1) for each action
dimension. The corrected action is

    planned + gate * (own - planned)

If the plan is useless, the gate can drop it; a residual would have to cancel it. The gate starts at zero: an
untrained corrector executes the plan unchanged. A corrector embeds each step once and keeps the embedding.

A trained corrector is one file, `corrector.safetensors`, in its own folder. Its header holds the
configuration and the fingerprint of the teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checked import from_json
from .config import CorrectorConfig
from .errors import CheckpointError, ConfigError
from .files import exists, read_tensors, write_tensors
from .world_model.checkpoint import fill
from .world_model.layers import NormedLinear, mlp

FILE = "corrector.safetensors"
FORMAT = "tdmpc2-corrector-2"


class History(NamedTuple):
    """The last `W` steps of each row's episode; the newest is last, and always valid."""

    steps: Tensor  # [B, W, E], from `BaseCorrector.embed`
    valid: Tensor  # [B, W] bool; False before the episode began

    def then(self, step: Tensor) -> "History":
        """The history with one more step `[B, E]`."""
        newest = torch.ones_like(self.valid[:, :1])
        return History(
            torch.cat([self.steps[:, 1:], step[:, None]], 1), torch.cat([self.valid[:, 1:], newest], 1)
        )


class BaseCorrector(nn.Module):
    """What all correctors share: the history, the gate, and the clamp.

    Args:
        config: the architecture.
        hidden: number `F` of features.

    Attributes:
        config: the architecture.
        window: number `W` of steps that it sees.
        embedding_dim: number `E` of entries of an embedded step.
    """

    window: int
    embedding_dim: int

    def __init__(self, config: CorrectorConfig, hidden: int):
        super().__init__()
        self.config = config
        self.own = nn.Linear(hidden, config.action_dim)
        self.gate = nn.Linear(hidden, config.action_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def no_history(self, rows: int) -> History:
        """The history of `rows` episodes that begin."""
        weight = next(self.parameters())
        steps = weight.new_zeros(rows, self.window, self.embedding_dim)
        return History(steps, torch.zeros(steps.shape[:2], dtype=torch.bool, device=weight.device))

    def embed(self, z: Tensor, z_pred: Tensor, planned: Tensor, k: Tensor) -> Tensor:
        """Embeddings of steps, `[..., E]`.

        Args:
            z: `[..., L]`, real latents.
            z_pred: `[..., L]`, latents predicted from the plan's first latent and the executed actions.
            planned: `[..., A]`, planned actions in [-1, 1].
            k: `[...]` long, step in plan.
        """
        raise NotImplementedError

    def forward(self, history: History, planned: Tensor) -> Tensor:
        """The corrected action `[B, A]` of the newest step, in [-1, 1], for the planned action `[B, A]`.

        In training, the clamp has the gradient of the identity. So an action that is clamped wrongly still
        gets a gradient.
        """
        hidden = self.features(history)
        action = planned + self.gate(hidden).tanh() * (self.own(hidden) - planned)
        if self.training:
            return action + (action.clamp(-1, 1) - action).detach()
        return action.clamp(-1, 1)

    def features(self, history: History) -> Tensor:
        """Features `[B, F]` for the gate and the corrector's own action."""
        raise NotImplementedError

    def _embedding(self, dim: int) -> nn.Embedding:
        # nn.Embedding's initialisation on the meta device imports PyTorch's compiler, which takes seconds.
        weight = torch.empty(self.config.max_k, dim)
        embedding = nn.Embedding(self.config.max_k, dim, _weight=weight if weight.is_meta else None)
        nn.init.trunc_normal_(embedding.weight, std=0.02)
        return embedding

    def _known(self, k: Tensor) -> Tensor:
        """Steps in plan, at most the last one that has an embedding."""
        return k.clamp(max=self.config.max_k - 1)


class TwoTowerCorrector(BaseCorrector):
    """Separate towers for the real latent, the predicted latent and their difference; sees one step."""

    window = 1

    def __init__(self, config: CorrectorConfig):
        super().__init__(config, config.width)
        c, width = config, config.width
        self.real = NormedLinear(c.latent_dim, width, nn.Mish())
        self.predicted = NormedLinear(c.latent_dim, width, nn.Mish())
        self.difference = NormedLinear(c.latent_dim, width, nn.Mish())
        self.step = self._embedding(width // 8)
        self.embedding_dim = 3 * width + width // 8 + c.action_dim
        self.trunk = mlp(self.embedding_dim, [width], width, last=nn.Mish())

    def embed(self, z: Tensor, z_pred: Tensor, planned: Tensor, k: Tensor) -> Tensor:
        towers = [self.real(z), self.predicted(z_pred), self.difference(z - z_pred)]
        return torch.cat([*towers, self.step(self._known(k)), planned], -1)

    def features(self, history: History) -> Tensor:
        return self.trunk(history.steps[:, -1])


class DistilledPolicy(TwoTowerCorrector):
    """The same network without the plan, for comparison: it sees the real latent only."""

    def embed(self, z: Tensor, z_pred: Tensor, planned: Tensor, k: Tensor) -> Tensor:
        return super().embed(z, z, torch.zeros_like(planned), torch.zeros_like(k))

    def forward(self, history: History, planned: Tensor) -> Tensor:
        return super().forward(history, torch.zeros_like(planned))


class TemporalTransformerCorrector(BaseCorrector):
    """A small transformer over the last `config.window` steps, each a token of `width / 2` entries.

    Every step attends to every valid step. The last layer computes the newest step only, because no other
    output is used.
    """

    def __init__(self, config: CorrectorConfig):
        c, dim = config, config.width // 2
        super().__init__(config, dim)
        self.window, self.embedding_dim = c.window, dim
        self.latents = NormedLinear(2 * c.latent_dim + c.action_dim, dim, nn.Mish())
        self.difference = NormedLinear(c.latent_dim, dim, nn.Mish())
        self.step = self._embedding(dim)
        self.position = nn.Parameter(torch.empty(c.window, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, c.width, c.num_heads) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(dim)

    def embed(self, z: Tensor, z_pred: Tensor, planned: Tensor, k: Tensor) -> Tensor:
        tokens = self.latents(torch.cat([z, z_pred, planned], -1))
        return tokens + self.difference(z - z_pred) + self.step(self._known(k))

    def features(self, history: History) -> Tensor:
        tokens = history.steps + self.position
        visible = history.valid[:, None, None]  # [B, 1 head, 1 query, W]
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            tokens = block(tokens[:, -1:] if last else tokens, tokens, visible)
        return self.norm(tokens[:, -1])


class Block(nn.Module):
    """A pre-norm transformer layer: attention, then a feed-forward network.

    Args:
        dim: entries of a token.
        hidden: width of the feed-forward network.
        heads: of the attention; divides `dim`.
    """

    def __init__(self, dim: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """`x` `[B, Q, dim]`, the last `Q` tokens of `context` `[B, W, dim]`, attends to `context`."""
        joined = self.query_key_value(self.norm(context))
        q, k, v = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, W, dim/heads]
        attended = F.scaled_dot_product_attention(q[:, :, -x.shape[1] :], k, v, attn_mask=visible)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


ARCHITECTURES: Mapping[str, Callable[[CorrectorConfig], BaseCorrector]] = {
    "two_tower": TwoTowerCorrector,
    "temporal": TemporalTransformerCorrector,
    "distilled": DistilledPolicy,
}


def build_corrector(config: CorrectorConfig) -> BaseCorrector:
    """An untrained corrector.

    Raises:
        ConfigError: there is no such architecture.
    """
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"architecture={config.architecture!r}: choose one of {known}")
    return ARCHITECTURES[config.architecture](config)


def save_corrector(folder: str | Path, corrector: BaseCorrector, teacher: str, **entries: Any) -> None:
    """Write a corrector as `folder/corrector.safetensors`, whole or not at all.

    Args:
        folder: made if it is missing.
        corrector: the corrector.
        teacher: fingerprint of the world model that it was distilled from.
        entries: further JSON values for the header.
    """
    header = {"format": FORMAT, "teacher": teacher, "config": asdict(corrector.config), **entries}
    write_tensors(Path(folder) / FILE, corrector.state_dict(), header)


def read_header(folder: str | Path) -> dict[str, Any]:
    """The header of a saved corrector: teacher, config, and the entries of `save_corrector`.

    Raises:
        CheckpointError: the file is missing, damaged, or not a corrector.
        FileError: the file cannot be read.
    """
    return _read(Path(folder) / FILE)[1]


@torch.inference_mode(False)
def load_corrector(
    folder: str | Path, teacher: str | None, device: str | torch.device = "cpu"
) -> BaseCorrector:
    """Load a corrector in evaluation mode.

    Args:
        folder: holds `corrector.safetensors`.
        teacher: fingerprint of the world model to use it with; None: any.
        device: to act on.

    Raises:
        CheckpointError: the file is missing, damaged, or belongs to another teacher.
        FileError: the file cannot be read.
    """
    path = Path(folder) / FILE
    state, header = _read(path)
    if teacher is not None and header.get("teacher") != teacher:
        raise CheckpointError(
            f"{path} was distilled from teacher {header.get('teacher')}, this one is {teacher}: "
            "train a corrector for it"
        )
    try:
        config = from_json(CorrectorConfig, header.get("config"))
        with torch.device("meta"):
            corrector = build_corrector(config)
    except ConfigError as e:
        raise CheckpointError(f"{path} does not fit this version ({e}): train it again") from e
    fill(corrector, state, path)
    return corrector.to(device).eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a corrector file."""
    if not exists(path):
        raise CheckpointError(f"no corrector at {path}: train one with `tdmpc2 distill`")
    return read_tensors(path, FORMAT, "train it again", CheckpointError)
