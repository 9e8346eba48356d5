"""Rank correlation of attention with a property of tokens, by layer and head, over all texts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_int, check_positive_int, check_room, shown
from lightning_plugins.functional.attention_correlation import cls_attention_correlation
from lightning_plugins.functional.tensors import check_dims, check_floating
from lightning_plugins.metrics._sums import SumMetric


class AttentionCorrelation(NamedTuple):
    """Mean correlations over texts.

    Attributes:
        mean: Shape ``(layers, heads)``; NaN where no text had a correlation.
        standard_error: Of the mean over texts, same shape; NaN for fewer than two texts.
        texts: Number of texts with a correlation, same shape.
    """

    mean: Tensor
    standard_error: Tensor
    texts: Tensor


class CLSAttentionCorrelation(SumMetric):
    """Correlation of the CLS token's attention with a property of tokens, such as IDF.

    The Spearman correlation of a head's attention with the property is computed within each text and averaged over
    texts, exact over batches and processes. See `lightning_plugins.plots.attention_heat_map_figure`.

    Args:
        num_layers: Number of layers.
        num_heads: Number of heads in each.
        query: Position of the attending token.

    Raises:
        ValueError: If a number is less than 1.
        TypeError: If an argument is not an int.

    Example:
        >>> metric = CLSAttentionCorrelation(num_layers=1, num_heads=2)
        >>> attention = torch.tensor([0.0, 0.1, 0.2, 0.7]).expand(1, 2, 4, 4)
        >>> metric.update([attention], torch.tensor([[0.0, 1.0, 5.0, 9.0]]))
        >>> metric.compute().mean
        tensor([[1., 1.]], dtype=torch.float64)
    """

    higher_is_better = None
    total: Tensor
    squares: Tensor
    texts: Tensor

    def __init__(self, num_layers: int, num_heads: int, *, query: int = 0) -> None:
        super().__init__()
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.query = check_int("query", query)
        check_room("num_layers", num_layers * num_heads)
        shape = (num_layers, num_heads)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("texts", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, attentions: Sequence[Tensor], values: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> None:
        """Add the texts of one batch.

        Args:
            attentions: One tensor ``(N, heads, L, L)`` for each layer, as transformers returns them under
                ``output_attentions=True``.
            values: As for `cls_attention_correlation`.
            mask: As there.
            tokens: As there.

        Raises:
            TypeError: If an attention is not a floating tensor.
            ValueError: If a number or shape does not fit.
        """
        if isinstance(attentions, str | bytes) or not isinstance(attentions, Sequence | Tensor):
            raise TypeError(f"`attentions` must be a sequence of tensors, one a layer, got {shown(attentions)}")
        if isinstance(attentions, Tensor):
            check_floating("attentions", attentions)
            check_dims("attentions", attentions, 5, "(layers, N, heads, L, L)")
        if len(attentions) != self.num_layers:
            raise ValueError(f"`attentions` must have `num_layers`={self.num_layers} entries, got {len(attentions)}")
        rows = []
        for attention in attentions:
            check_floating("attentions", attention)
            found = cls_attention_correlation(attention.detach(), values, mask, tokens, query=self.query)
            if found.shape[1] != self.num_heads:
                raise ValueError(f"`attentions` must have `num_heads`={self.num_heads} heads, got {found.shape[1]}")
            rows.append(found)
        every = torch.stack(rows).to(self.total.dtype)  # (layers, N, heads)
        known = ~every.isnan()
        every = torch.where(known, every, 0.0)
        self.total = self.total + every.sum(dim=1)
        self.squares = self.squares + every.square().sum(dim=1)
        self.texts = self.texts + known.sum(dim=1)

    def compute(self) -> AttentionCorrelation:
        """Means over the texts of all batches and processes.

        Returns:
            Mean, standard error and number of texts.
        """
        mean = self.total / self.texts
        variance = (self.squares - self.total * mean).clamp_min(0.0) / (self.texts - 1)
        error = torch.where(self.texts > 1, (variance / self.texts).sqrt(), torch.nan)
        return AttentionCorrelation(mean, error, self.texts)
