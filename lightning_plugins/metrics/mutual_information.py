"""A bound on the mutual information of two views' embeddings, with all rows of an epoch as candidates."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins.functional.information import check_clip
from lightning_plugins.functional.pair_scores import BOUNDS, candidate_bound, row_keys
from lightning_plugins.functional.spectrum import full_precision
from lightning_plugins.metrics._embeddings import check_embeddings

_UNITS = ("nats", "bits")


class MutualInformation(Metric):
    """Bound on the mutual information between two views' embeddings, from scores computed in blocks.

    Rows are stored, gathered from all processes at the end, and ordered by their values: the result does not depend on
    how they were split. Scores are computed in float32 and never gathered.

    Args:
        x_features: Number of columns of the first view's embeddings.
        y_features: Number of columns of the second view's; by default the same.
        critic: Maps rows of both views, shapes ``(n, x_features)`` and ``(m, y_features)``, to scores ``(n, m)``; for
            example ``fit_critic(...).critic``, fitted on other rows. None uses inner products.
        bound: ``"infonce"``, ``"nwj"``, ``"dv"`` or ``"smile"``; see `lightning_plugins.functional`.
        num_candidates: K; None for all pairs. With fewer the result is the mean over batches of K pairs.
        max_pairs: Maximum number of pairs kept, a random sample.
        clip: Clipping of ``"smile"``.
        units: ``"nats"`` or ``"bits"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> metric = MutualInformation(8)
        >>> metric.update(50 * torch.eye(8), torch.eye(8))  # eight pairs, all distinguished
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items() if name != "self_normalization"}
        {'estimate': 2.0794, 'standard_error': 0.0, 'ceiling': 2.0794, 'num_candidates': 8.0}
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = True

    rows: list[Tensor] | Tensor

    def __init__(
        self,
        x_features: int,
        y_features: int | None = None,
        *,
        critic: Callable[[Tensor, Tensor], Tensor] | None = None,
        bound: str = "infonce",
        num_candidates: int | None = None,
        max_pairs: int = 16384,
        clip: float = 5.0,
        units: str = "nats",
    ) -> None:
        super().__init__()
        self.x_features = check_positive_int("x_features", x_features)
        self.y_features = x_features if y_features is None else check_positive_int("y_features", y_features)
        if critic is not None and not callable(critic):
            raise TypeError(f"`critic` must be callable or None, got {type(critic).__name__}")
        if critic is None and self.x_features != self.y_features:
            raise ValueError(
                f"`critic=None` takes inner products and needs `y_features` equal to `x_features`, got "
                f"{self.x_features} and {self.y_features}; fit a critic with `information.fit_critic`"
            )
        self.critic = critic
        self.bound = check_choice("bound", bound, BOUNDS)
        self.max_pairs = check_positive_int("max_pairs", max_pairs)
        if num_candidates is not None and not 2 <= check_positive_int("num_candidates", num_candidates) <= max_pairs:
            raise ValueError(f"`num_candidates` must be in [2, `max_pairs` = {max_pairs}], got {num_candidates}")
        self.num_candidates = num_candidates
        check_clip(clip)
        self.clip = float(clip)
        self.units = check_choice("units", units, _UNITS)
        self.set_dtype(torch.float32)  # independent of the default dtype when each process created its metric
        # flat: a process without rows sends an empty 1-D tensor, whatever the others have
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Keep the pairs of one batch.

        Args:
            x: Floating tensor of shape ``(N, x_features)``.
            y: Floating tensor of shape ``(N, y_features)``, row by row the partners of ``x``.

        Raises:
            TypeError: If one is not a floating tensor.
            ValueError: If it has another shape.
        """
        check_embeddings("x", x, self.x_features)
        check_embeddings("y", y, self.y_features)
        if len(x) != len(y):
            raise ValueError(f"`y` must have a row for each of the {len(x)} rows of `x`, got {len(y)}")
        rows = torch.cat([x.detach().to(self.dtype), y.detach().to(self.dtype)], dim=1)
        kept = self._kept()
        if len(kept) + len(rows) > 2 * self.max_pairs:  # now and then
            self.rows = [self._sample(torch.cat([kept, rows])).flatten()]
        elif isinstance(self.rows, list):
            self.rows.append(rows.flatten())

    def compute(self) -> dict[str, Tensor]:
        """Bound over the pairs of all batches and processes.

        Returns:
            Scalars ``"estimate"``, ``"standard_error"``, ``"ceiling"`` (``ln K``), ``"num_candidates"`` (K) and
            ``"self_normalization"`` (0 for the logarithm of the density ratio); NaN for fewer than two pairs, or fewer
            pairs than candidates.
        """
        rows = self._sample(self._kept())
        unit = math.log(2) if self.units == "bits" else 1.0
        least = self.num_candidates or 2
        if len(rows) < least:
            names = ("estimate", "standard_error", "ceiling", "num_candidates", "self_normalization")
            return {name: rows.new_full((), torch.nan) for name in names}
        with torch.no_grad(), full_precision(rows):
            found = candidate_bound(
                rows[:, : self.x_features],
                rows[:, self.x_features :],
                self.critic or _inner_product,
                bound=self.bound,
                num_candidates=self.num_candidates,
                clip=self.clip,
            )
        values = {
            "estimate": found.value / unit,
            "standard_error": found.standard_error / unit,
            "ceiling": math.log(found.num_candidates) / unit,
            "num_candidates": float(found.num_candidates),
            "self_normalization": found.self_normalization / unit,
        }
        return {name: rows.new_tensor(value) for name, value in values.items()}

    def _kept(self) -> Tensor:
        kept = [self.rows] if isinstance(self.rows, Tensor) else self.rows  # gathered from the processes, or not
        flat = torch.cat([*kept, torch.empty(0, device=self.device, dtype=self.dtype)])
        return flat.view(-1, self.x_features + self.y_features)

    def _sample(self, rows: Tensor) -> Tensor:
        """The rows with the smallest hashes, ordered by hash, up to a maximum number."""
        return rows[row_keys(*rows.split([self.x_features, self.y_features], dim=1)).argsort()[: self.max_pairs]]


def _inner_product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.T
