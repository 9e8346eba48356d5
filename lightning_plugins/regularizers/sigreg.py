"""SIGReg: embeddings with an isotropic Gaussian distribution, tested on random projections."""

from dataclasses import dataclass

from torch import Tensor

from lightning_plugins._checks import check_bool, check_non_negative_int, check_positive_int, check_positive_number
from lightning_plugins.functional.epps_pulley import epps_pulley, random_directions
from lightning_plugins.regularizers.embedding_term import EmbeddingTerm, Scope


@dataclass(frozen=True)
class Quadrature:
    """The trapezoidal rule of the statistic.

    Attributes:
        knots: Number of points, at least 2.
        extent: The integral goes from ``-extent`` to ``extent``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.
    """

    knots: int = 17
    extent: float = 5.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if check_positive_int("knots", self.knots) < 2:
            raise ValueError(f"`knots` must be at least 2, got {self.knots}")
        check_positive_number("extent", self.extent)


class SIGReg(EmbeddingTerm):
    """Loss term ``weight * T`` with ``T`` the mean over random directions of the statistic of Epps and Pulley.

    Embeddings (neither scaled nor centred) are pulled towards a Gaussian of mean 0 and covariance 1. The directions
    depend only on ``seed`` and ``step``, so they are the same on all processes and for all views of a step.
    `RepresentationRegularization` sets ``step`` to the optimizer step; in your own loop set it yourself, or the
    directions never change.

    Args:
        weight: Factor on the statistic.
        directions: Number of random directions.
        resample: Whether new directions are drawn at each step.
        quadrature: The quadrature rule for the statistic.
        seed: Seed of the directions, at least 0.
        scope: See `EmbeddingTerm`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> term = SIGReg(directions=64)
        >>> gaussian = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> bool(term(gaussian) < term(2 * gaussian))
        True

    Source:
        Balestriero and LeCun (LeJEPA), 2025, https://arxiv.org/abs/2511.08544, with its defaults: 17 points from -5 to
        5, the statistic multiplied by the number of rows. The scope over processes of unequal batches is ours.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        directions: int = 256,
        resample: bool = True,
        quadrature: Quadrature | None = None,
        seed: int = 0,
        scope: Scope = "global",
    ) -> None:
        super().__init__(weight, scope=scope)
        self.directions = check_positive_int("directions", directions)
        self.resample = check_bool("resample", resample)
        if quadrature is not None and not isinstance(quadrature, Quadrature):
            raise TypeError(f"`quadrature` must be a Quadrature, got {quadrature!r} ({type(quadrature).__name__})")
        self.quadrature = Quadrature() if quadrature is None else quadrature
        self.seed = check_non_negative_int("seed", seed)
        self.step = 0

    def measure(self, rows: Tensor) -> Tensor:
        """Return the mean statistic."""
        seed = self.seed + 1_000_003 * (self.step if self.resample else 0)
        directions = random_directions(rows.shape[1], self.directions, seed=seed, like=rows)
        rule = self.quadrature
        return epps_pulley(rows, directions, knots=rule.knots, extent=rule.extent).mean()

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"weight={self.weight}, directions={self.directions}, resample={self.resample}, "
            f"quadrature={self.quadrature}, seed={self.seed}, scope={self.scope!r}"
        )
