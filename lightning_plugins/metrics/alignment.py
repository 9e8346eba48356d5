"""Closeness of two views of the same samples."""

import torch
from torch import Tensor

from lightning_plugins.functional.spectrum import normalize_rows
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.metrics._embeddings import check_embeddings, valid_rows
from lightning_plugins.metrics._sums import SumMetric


class Alignment(SumMetric):
    """Mean squared distance between the unit embeddings of two views of the same samples, in ``[0, 4]``.

    Lower is closer; it equals ``2 - 2 * mean(cosine)``. Exact over batches and ranks: sums and counts are stored.

    Example:
        >>> import torch
        >>> metric = Alignment()
        >>> views = torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 0.0]])  # one pair equal, one at a right angle
        >>> round(metric(*views).item(), 4)
        1.0

    Source:
        Wang and Isola, ICML 2020, https://arxiv.org/abs/2005.10242, with their default exponent 2.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 4.0

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor, mask: Tensor | None = None) -> None:
        """Add the pairs of one batch.

        Args:
            first: Floating tensor of shape ``(N, d)``, embeddings of one view.
            second: Floating tensor of the same shape, embeddings of the other view, row by row of the same samples.
            mask: Bool or integer tensor of the shape of ``first`` without its last dimension, true where a pair counts.
                With one, the embeddings may be of shape ``(N, L, d)``.

        Raises:
            TypeError: If one of them is not a floating tensor, or ``mask`` neither bool nor integer.
            ValueError: If they are not matrices of the same shape.
        """
        if mask is None:
            check_embeddings("first", first)
            check_embeddings("second", second)
        check_floating("first", first)
        check_floating("second", second)
        if first.shape != second.shape:
            raise ValueError(
                f"`second` must have the shape of `first`, {tuple(first.shape)}, got {tuple(second.shape)}; "
                "its rows are the same samples in the same order"
            )
        one, count = valid_rows("first", first, None, mask)
        other, _ = valid_rows("second", second, None, mask)
        distances = normalize_rows(one.to(self.total.dtype)) - normalize_rows(other.to(self.total.dtype))
        self.total = self.total + distances.square().sum()
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Mean over all pairs of all batches and ranks.

        Returns:
            Scalar; NaN if there was no pair.
        """
        return self.total / self.count
