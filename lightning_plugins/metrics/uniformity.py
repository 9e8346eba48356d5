"""Evenness of embeddings on the sphere, from all pairs."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._checks import check_finite_number, check_positive_int
from lightning_plugins.functional.spectrum import full_precision, normalize_rows
from lightning_plugins.metrics._embeddings import check_embeddings, check_mask

_CHUNK = 1024  # rows compared with all others in one block


class Uniformity(Metric):
    """Logarithm of the mean of ``exp(-t * distance**2)`` over all pairs of unit embeddings; lower is more uniform.

    The mean over pairs is not a sum over batches, so this metric, unlike the spectral ones, stores every row:
    ``4 * N * d`` bytes on the device, gathered from all ranks at the end, and ``N**2 * d`` multiplications in blocks of
    1024 rows: 20 MB for a validation set of 10 000 rows and ``d = 512``. For a million rows use a sample.

    Args:
        num_features: Number of columns ``d`` of the embeddings.
        t: Sharpness of the kernel, positive.

    Raises:
        ValueError: If ``num_features`` is less than 1 or ``t`` is not positive and finite.
        TypeError: If ``num_features`` is not an int or ``t`` not a number.

    Example:
        >>> import torch
        >>> metric = Uniformity(num_features=2)
        >>> round(metric(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])).item(), 4)  # opposite points: -t * 2**2
        -8.0

    Source:
        Wang and Isola, ICML 2020, https://arxiv.org/abs/2005.10242, with their default ``t = 2``.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    plot_upper_bound = 0.0

    rows: list[Tensor]

    def __init__(self, num_features: int, t: float = 2.0) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        self.t = check_finite_number("t", t)
        if t <= 0:
            raise ValueError(f"`t` must be positive, got {t!r}")
        self.set_dtype(torch.float32)  # independent of the default dtype when each rank created its metric
        # rows are stored flat: a rank without any sends an empty 1-D tensor, whatever the others have
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, mask: Tensor | None = None) -> None:
        """Keep the rows of one batch.

        Args:
            embeddings: Floating tensor of shape ``(N, num_features)``, or with a mask also ``(N, L, num_features)``.
            mask: As for the other metrics; which rows it selects is read from the device.

        Raises:
            TypeError: If ``embeddings`` is not a floating tensor, or ``mask`` neither bool nor integer.
            ValueError: If one has another shape.
        """
        if mask is not None:
            embeddings = embeddings.flatten(end_dim=-2)[check_mask("embeddings", embeddings, mask)]
        rows = check_embeddings("embeddings", embeddings, self.num_features).detach()
        self.rows.append(normalize_rows(rows.to(self.dtype)).flatten())

    def compute(self) -> Tensor:
        """Value over all pairs of rows of all batches and ranks.

        Returns:
            Scalar; NaN if there were fewer than two rows.
        """
        kept = [self.rows] if isinstance(self.rows, Tensor) else self.rows  # gathered from the ranks, or not
        rows = torch.cat([*kept, torch.empty(0, device=self.device, dtype=self.dtype)]).view(-1, self.num_features)
        total = rows.new_zeros(())
        for start in range(0, len(rows), _CHUNK):
            rest = rows[start:]
            block = rest[:_CHUNK]
            lengths = rest.square().sum(dim=1)  # 1, or 0 for an all-zero row
            with full_precision(rows):
                distances = (lengths[: len(block), None] + lengths - 2 * block @ rest.T).clamp_min(0.0)
            total = total + distances.mul(-self.t).exp().triu(diagonal=1).sum()  # each pair once
        pairs = len(rows) * (len(rows) - 1) // 2
        return (total / pairs).log() if pairs else total.fill_(torch.nan)
