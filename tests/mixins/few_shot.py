"""Small tasks and modules that the tests of the meta-learning mixins share."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule  # the contract runs with both packages
from lightning_plugins.meta import GAP, Preconditioner
from lightning_plugins.mixins import GAPMixin, InnerSettings, MAMLMixin

TASKS = 5
RATE = 0.2  # of the inner steps: large enough for second-order terms to count


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def inner_settings(own: dict[str, Any] | None = None) -> InnerSettings:
    return InnerSettings(**{"steps": 2, "evaluation_steps": 3, "learning_rate": RATE, **(own or {})})


class Few(MAMLMixin, LightningModule):
    def __init__(self, preconditioner: Preconditioner | None = None, *, inner: Any = None, **settings: Any) -> None:
        super().__init__(mlp(), F.mse_loss, preconditioner, inner=inner_settings(inner), **settings)


class FewGAP(GAPMixin, LightningModule):
    def __init__(self, preconditioner: Preconditioner | None = None, *, inner: Any = None, **settings: Any) -> None:
        settings = {
            "learning_rate": 0.01,
            "preconditioner_learning_rate": 0.05,
            **settings,
        }
        preconditioner = preconditioner or GAP(linear=True)
        super().__init__(mlp(), F.mse_loss, preconditioner, inner=inner_settings(inner), **settings)


def make_tasks(count: int = 4, tasks: int = TASKS, *, seed: int = 0) -> list[Any]:
    """Batches of regression tasks, ``((support_x, support_y), (query_x, query_y))``."""
    generator = torch.Generator().manual_seed(seed)

    def samples(number: int, shift: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, number, 2, generator=generator)
        return x, x.sum(-1, keepdim=True).sin() + shift

    batches = []
    for _ in range(count):
        shift = 2 * torch.randn(tasks, 1, 1, generator=generator)
        batches.append((samples(6, shift), samples(4, shift)))
    return batches


def shard_tasks(batches: Sequence[Any], bounds: Sequence[int]) -> list[Any]:
    """This rank's tasks of every batch."""
    rank = int(os.environ.get("RANK", "0"))
    part = slice(bounds[rank], bounds[rank + 1])
    return [tuple(tuple(tensor[part] for tensor in pair) for pair in batch) for batch in batches]


def as_double(batches: Sequence[Any]) -> list[Any]:
    return [tuple(tuple(tensor.double() for tensor in pair) for pair in batch) for batch in batches]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


class ByHand(LightningModule):
    """GAP as its authors wrote it down, one task after the other, by plain autograd; without raw gains MAML."""

    def __init__(self, *, gap: bool = True, steps: int = 2, rates: tuple[float, float] = (0.01, 0.05)) -> None:
        super().__init__()
        self.network, self.steps, self.rates = mlp(), steps, rates
        raw = [nn.Parameter(torch.full((min(w.shape),), 0.928)) for w in self.network.parameters() if w.ndim == 2]
        self.raw = nn.ParameterList(raw if gap else [])

    def losses(self, batch: Any, steps: int) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return torch.stack([self.task(*parts, steps) for parts in zip(*batch[0], *batch[1], strict=True)])

    def task(self, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor, steps: int) -> Tensor:
        current = list(self.network.parameters())
        for _ in range(steps):
            gradients = torch.autograd.grad(F.mse_loss(self.run(current, x), y), current, create_graph=True)
            gains = iter(self.raw)
            current = [
                w - RATE * (self.update(g, next(gains)) if len(self.raw) and g.ndim == 2 else g)
                for w, g in zip(current, gradients, strict=True)
            ]
        return F.mse_loss(self.run(current, query_x), query_y)

    @staticmethod
    def update(gradient: Tensor, raw: Tensor) -> Tensor:
        u = torch.linalg.svd(gradient.detach(), full_matrices=False)[0]
        return u @ torch.diag(F.softplus(raw, beta=2)) @ u.T @ gradient

    @staticmethod
    def run(w: Sequence[Tensor], x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch, self.steps).mean()

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.network.parameters(), "lr": self.rates[0]}]
        groups += [{"params": self.raw.parameters(), "lr": self.rates[1]}] if len(self.raw) else []
        return torch.optim.Adam(groups)


def assert_learned_alike(model: nn.Module, expected: ByHand, **tolerance: float) -> None:
    """The network's weights and the gains, in their order."""
    found = {name: value for name, value in weights(model).items() if name.startswith("inner_loop.")}
    torch.testing.assert_close(list(found.values()), list(expected.state_dict().values()), **tolerance)
