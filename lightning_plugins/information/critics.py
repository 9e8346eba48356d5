"""Critics: networks that score pairs, initialised with the density ratio of Gaussians."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice
from lightning_plugins.information.marginals import Kind, Marginals

CRITICS = ("separable", "bilinear", "joint", "cosine")
_JOINT_ELEMENTS = 1 << 22  # maximum number of hidden activations of a joint critic in memory


class Start(NamedTuple):
    """Initial values of a critic.

    Attributes:
        kind: Normalisation of features.
        ridge: Added to the variances of the Gaussian; None for a density ratio of 1.
    """

    kind: Kind
    ridge: float | None


class GaussianRatio(nn.Module):
    """The log density ratio of jointly Gaussian vectors, as an inner product of encodings.

    ``-x' J_xy y - x' (J_xx - S_xx^-1) x / 2 - y' (J_yy - S_yy^-1) y / 2 + const`` with ``J`` the inverse of the
    covariance ``S``.

    Args:
        x: Rows to learn from, shape ``(n, d)``.
        y: Their partners, shape ``(n, e)``.
        ridge: Added to the diagonal of the covariance; None for a ratio of 1 everywhere.
    """

    def __init__(self, x: Tensor, y: Tensor, ridge: float | None) -> None:
        super().__init__()
        d, e = x.shape[1], y.shape[1]
        cross, a, b, constant = x.new_zeros(d, e), x.new_zeros(d, d), x.new_zeros(e, e), x.new_zeros(())
        if ridge is not None:
            z = torch.cat([x, y], dim=1).double()
            s = z.T.cov() + ridge * torch.eye(d + e, dtype=z.dtype, device=z.device)
            j, own_x, own_y = (torch.linalg.inv(part) for part in (s, s[:d, :d], s[d:, d:]))
            cross, a, b = (part.to(x) for part in (-j[:d, d:], j[:d, :d] - own_x, j[d:, d:] - own_y))
            logs = [torch.linalg.slogdet(part).logabsdet for part in (s[:d, :d], s[d:, d:], s)]
            constant = ((logs[0] + logs[1] - logs[2]) / 2).to(x)
        self.cross, self.a, self.b = (nn.Parameter(part.contiguous()) for part in (cross, a, b))
        self.constant = nn.Parameter(constant)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both sides; the inner product of the encodings is the score.

        Returns:
            Shapes ``(n, e + 2)`` and ``(m, e + 2)``.
        """
        of_x = self.constant - ((x @ self.a) * x).sum(dim=1, keepdim=True) / 2
        of_y = -((y @ self.b) * y).sum(dim=1, keepdim=True) / 2
        return (
            torch.cat([x @ self.cross, of_x, torch.ones_like(of_x)], dim=1),
            torch.cat([y, torch.ones_like(of_y), of_y], dim=1),
        )


class Critic(nn.Module):
    """A score for every pair of rows; per-row computations are done once in `encode`.

    Args:
        x: Training rows, shape ``(n, d)``, for the scale of features and the initialisation.
        y: Their partners, shape ``(n, e)``.
        start: The initialisation.
    """

    def __init__(self, x: Tensor, y: Tensor, start: Start) -> None:
        check_arguments(Critic.__init__, locals())
        super().__init__()
        self.of_x, self.of_y = Marginals(x, start.kind), Marginals(y, start.kind)
        self.base = GaussianRatio(self.of_x(x), self.of_y(y), start.ridge)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the encoding of each row.

        Returns:
            The encodings of ``x`` and of ``y``, one row each.
        """
        return self.base.encode(self.of_x(x), self.of_y(y))

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Score encodings.

        Returns:
            Shape ``(n, m)``.
        """
        return x @ y.T

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Score all pairs of rows.

        Returns:
            Shape ``(n, m)``.
        """
        return self.score(*self.encode(x, y))


class BilinearCritic(Critic):
    """A bilinear form of the features and a quadratic form of each side: enough for Gaussians."""


class SeparableCritic(Critic):
    """The bilinear critic plus the inner product of two networks' outputs; cheap with many candidates.

    Args:
        x: Training rows.
        y: Their partners.
        start: The initialisation; the networks contribute nothing at first.
        width: Hidden units of the networks.
    """

    def __init__(self, x: Tensor, y: Tensor, start: Start, width: int) -> None:
        super().__init__(x, y, start)
        self.net_x, self.net_y = _network(x.shape[1], width, 65), _network(y.shape[1], width, 65)
        _silence(self.net_x[-1])
        with torch.no_grad():  # the offset of y, the last output, is zero as well
            for parameter in self.net_y[-1].parameters():
                parameter[-1].zero_()

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the encoding of each row.

        Returns:
            The encodings of ``x`` and of ``y``, one row each.
        """
        z_x, z_y = self.of_x(x), self.of_y(y)
        base_x, base_y = self.base.encode(z_x, z_y)
        own_x, own_y = self.net_x(z_x), self.net_y(z_y)
        one_x, one_y = torch.ones_like(own_x[:, :1]), torch.ones_like(own_y[:, :1])
        return torch.cat([base_x, own_x, one_x], dim=1), torch.cat([base_y, own_y[:, :-1], one_y, own_y[:, -1:]], dim=1)


class JointCritic(Critic):
    """The bilinear critic plus a network of both rows jointly; its cost is proportional to the number of pairs.

    Args:
        x: Training rows.
        y: Their partners.
        start: The initialisation; the network contributes nothing at first.
        width: Hidden units of its two hidden layers.
    """

    def __init__(self, x: Tensor, y: Tensor, start: Start, width: int) -> None:
        super().__init__(x, y, start)
        self.width = width
        self.first_x, self.first_y = nn.Linear(x.shape[1], width), nn.Linear(y.shape[1], width, bias=False)
        self.rest = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        _silence(self.rest[-1])

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the encoding of each row.

        Returns:
            The encodings of ``x`` and of ``y``, one row each.
        """
        z_x, z_y = self.of_x(x), self.of_y(y)
        base_x, base_y = self.base.encode(z_x, z_y)
        return torch.cat([base_x, self.first_x(z_x)], dim=1), torch.cat([base_y, self.first_y(z_y)], dim=1)

    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Score encodings, a few anchors at a time.

        Returns:
            Shape ``(n, m)``.
        """
        rows = max(1, _JOINT_ELEMENTS // (len(y) * self.width))
        base = x[:, : -self.width] @ y[:, : -self.width].T
        own = [self.rest(part[:, None] + y[:, -self.width :]).squeeze(2) for part in x[:, -self.width :].split(rows)]
        return base + torch.cat(own)


class CosineCritic(Critic):
    """The cosine of the two raw rows over a learned temperature: the score of contrastive losses.

    Args:
        x: Training rows.
        y: Their partners, with the same number of features.
        start: Not used; the temperature starts at 0.2.

    Raises:
        ValueError: If ``x`` and ``y`` differ in their number of features.
    """

    def __init__(self, x: Tensor, y: Tensor, start: Start) -> None:
        super().__init__(x[:2], y[:2], Start("standard", None))
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"`critic='cosine'` needs as many features of x as of y, got {x.shape[1]} and {y.shape[1]}; "
                "'separable' takes any"
            )
        self.base.requires_grad_(False)
        self.log_scale = nn.Parameter(x.new_tensor(5.0).log())

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scale rows to unit length, those of ``x`` over the temperature.

        Returns:
            The encodings of ``x`` and of ``y``, one row each.
        """
        return F.normalize(x) * self.log_scale.exp(), F.normalize(y)


def make_critic(name: str, x: Tensor, y: Tensor, start: Start, width: int) -> Critic:
    """Create a critic by name.

    Args:
        name: ``"separable"``, ``"bilinear"``, ``"joint"`` or ``"cosine"``.
        x: Training rows, shape ``(n, d)``.
        y: Their partners, shape ``(n, e)``.
        start: The initialisation.
        width: Hidden units of its networks, if any.

    Returns:
        The critic, of the dtype and on the device of ``x``.

    Raises:
        ValueError: If the name is unknown.
    """
    check_choice("critic", name, CRITICS)
    if name == "bilinear":
        made: Critic = BilinearCritic(x, y, start)
    elif name == "cosine":
        made = CosineCritic(x, y, start)
    elif name == "joint":
        made = JointCritic(x, y, start, width)
    else:
        made = SeparableCritic(x, y, start, width)
    return made.to(x)


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )


def _silence(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
