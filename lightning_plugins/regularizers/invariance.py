"""I-VNE+: self-supervised learning from the invariance between views and the entropy of each."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins.distributed import sum_over_ranks
from lightning_plugins.functional.entropy import Method
from lightning_plugins.regularizers.von_neumann import Scope, check_matrix, entropy_over_ranks, row_counts, unit_rows


class InvarianceVNE(nn.Module):
    """The I-VNE+ loss ``-invariance_weight * mean(cos) - entropy_weight * mean(S)`` of two or more views of a batch.

    The mean cosine is over the samples and over all pairs of different views with a large view first; the mean
    entropy ``S``, in nats, over the views. Both are computed on the projector's output. The published recipe takes
    views of 64 samples and a projector 2048-2048-256 with batch normalisation.

    Under ``scope="global"`` both means are over the rows of all ranks, and ranks and gradients are handled as in
    `VonNeumannEntropy`.

    Args:
        invariance_weight: Weight of the mean cosine; None for ``log(N)`` with ``N`` the rows of a view, of all ranks
            under ``scope="global"``. That is the published recipe, 4.16 at 64 rows; counting all ranks in ``N`` is our
            interpretation.
        entropy_weight: Weight of the mean entropy.
        scope: ``"global"`` for the batch of all ranks together, ``"local"`` for this rank's own rows.
        method: How the spectrum is computed; see `lightning_plugins.functional.matrix_entropy`.

    Raises:
        TypeError: If a weight is not a number, ``scope`` or ``method`` not a string.
        ValueError: If a weight is not finite, ``scope`` or ``method`` unknown.

    Example:
        >>> views = [torch.eye(4), torch.eye(4)]
        >>> InvarianceVNE()(views)  # cosine 1, entropy log(4), and so is the weight: the least there is for 4 samples
        tensor(-2.7726)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434. The scope over ranks is ours.
    """

    def __init__(
        self,
        invariance_weight: float | None = None,
        entropy_weight: float = 1.0,
        *,
        scope: Scope = "global",
        method: Method = "auto",
    ) -> None:
        super().__init__()
        if invariance_weight is not None:
            check_finite_number("invariance_weight", invariance_weight)
        self.invariance_weight = invariance_weight
        self.entropy_weight = check_finite_number("entropy_weight", entropy_weight)
        self.scope = check_choice("scope", scope, get_args(Scope))
        check_choice("method", method, get_args(Method))
        self.method: Method = method

    def forward(self, views: Sequence[Tensor], large_views: int | None = None) -> Tensor:
        """Return the loss.

        Args:
            views: Two or more floating tensors of one shape ``(N, d)``: row ``i`` of each is a view of sample ``i``.
                The large views come first.
            large_views: Number of large views among ``views``; None for all of them.

        Returns:
            Scalar: float32 for float16 and bfloat16 views, else in their dtype.

        Raises:
            TypeError: If ``views`` is not a sequence of real floating tensors, or ``large_views`` not an int.
            ValueError: If there are fewer than two views, their shapes differ or are not ``(N, d)``, there are more
                large views than views, or no rank has a row.
        """
        large = _check_views(views, large_views)
        counts = row_counts("views", views[0], self.scope, len(views))
        samples, dim = sum(counts), views[0].shape[1]
        units = [unit_rows(view, counts) for view in views]
        memory = units[0].new_empty((0, dim))
        entropies = [entropy_over_ranks(rows, counts, memory=memory, method=self.method) for rows in units]
        whole = torch.stack(units).sum(0)
        # For each large view the cosines with all others at once: that with the sum of all views, minus itself.
        cosines = torch.stack([(rows * (whole - rows)).sum() for rows in units[:large]])
        cosine = cosines.sum() / (large * (len(views) - 1) * samples)
        if len(counts) > 1:
            cosine = sum_over_ranks(cosine)
        weight = math.log(samples) if self.invariance_weight is None else self.invariance_weight
        return -weight * cosine - self.entropy_weight * torch.stack(entropies).mean()

    def extra_repr(self) -> str:
        """Show the settings."""
        weights = f"invariance_weight={self.invariance_weight}, entropy_weight={self.entropy_weight}"
        return f"{weights}, scope={self.scope!r}, method={self.method!r}"


def _check_views(views: Sequence[Tensor], large_views: int | None) -> int:
    if not isinstance(views, Sequence):
        hint = "; did you mean `views.unbind()`?" if isinstance(views, Tensor) else ""
        raise TypeError(f"`views` must be a list of tensors, got {type(views).__name__}{hint}")
    if len(views) < 2:
        raise ValueError(f"`views` must hold at least two views of the batch, got {len(views)}")
    for index, view in enumerate(views):
        check_matrix(f"views[{index}]", view)
        if view.shape != views[0].shape:
            raise ValueError(f"`views` must have one shape (N, d), got {tuple(views[0].shape)} and {tuple(view.shape)}")
    if large_views is None:
        return len(views)
    if check_positive_int("large_views", large_views) > len(views):
        raise ValueError(f"`large_views` must be at most the number of views, {len(views)}, got {large_views}")
    return large_views
