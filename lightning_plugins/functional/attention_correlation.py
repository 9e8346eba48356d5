"""Rank correlation of attention with a property of the tokens that are attended to."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_int
from lightning_plugins.functional.tensors import check_floating, check_real


def cls_attention_correlation(
    attention: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    tokens: Tensor | None = None,
    *,
    query: int = 0,
) -> Tensor:
    """Spearman correlation, per text and head, of one query's attention with a property of the keys.

    Special tokens and padding are left out by the mask. Positions that hold the same token (pieces of one word and
    repeated words, if ``tokens`` numbers words) are one entry, with their mean attention and mean value. Ties share
    their ranks.

    Args:
        attention: Shape ``(N, heads, L, L)``, query before key.
        values: The property of every key, shape ``(N, L)``; what the mask leaves out may be anything.
        mask: Boolean or 0/1 of shape ``(N, L)``: keys that count. None counts all but the query itself.
        tokens: Integers of shape ``(N, L)``: which positions hold the same token. None takes every position for itself.
        query: Position of the query; 0 is the CLS token.

    Returns:
        Tensor of shape ``(N, heads)`` in ``[-1, 1]``, float64; NaN for a text of fewer than two entries, or with all
        values, or all attention, alike.

    Raises:
        TypeError: If ``attention`` is not a floating tensor.
        ValueError: If the shapes do not fit, or the query is none of the positions.

    Example:
        >>> attention = torch.tensor([0.0, 0.1, 0.2, 0.7]).expand(1, 2, 4, 4)
        >>> cls_attention_correlation(attention, torch.tensor([[0.0, 1.0, 5.0, 9.0]]))
        tensor([[1., 1.]], dtype=torch.float64)

    Source:
        The quantity of Choi et al., https://arxiv.org/abs/2202.12191, in our reading: per text, then averaged.
    """
    check_floating("attention", attention)
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(f"`attention` must have shape (N, heads, L, L), got {tuple(attention.shape)}")
    shape = (attention.shape[0], attention.shape[3])
    for name, given in (("values", values), ("mask", mask), ("tokens", tokens)):
        if given is None and name != "values":
            continue
        check_real(name, given)  # type: ignore[arg-type]  # None is refused here
        if given is not None and given.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, one entry per key, got {tuple(given.shape)}")
    if not -shape[1] <= check_int("query", query) < shape[1]:
        raise ValueError(f"`query` must be one of the {shape[1]} positions, got {query}")
    given = attention[:, :, query].double()
    kept = mask.bool() if mask is not None else torch.ones(shape, dtype=torch.bool, device=attention.device)
    if mask is None:
        kept[:, query] = False
    values = torch.where(kept, values.double(), 0.0)
    if tokens is not None:
        given, values, kept = _merge_equal(given, values, kept, tokens)
    pairs = kept[:, :, None] & kept[:, None, :]
    x, y = _ranks(given, pairs[:, None]), _ranks(values, pairs)[:, None].expand_as(given)
    return _correlation(x, y, kept[:, None])


def _merge_equal(given: Tensor, values: Tensor, kept: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over positions of the same token, at the first of them; the others are left out."""
    same = (tokens[:, :, None] == tokens[:, None, :]) & kept[:, :, None] & kept[:, None, :]
    share = same.double() / same.sum(dim=-1, keepdim=True).clamp_min(1)
    first = kept & (same.tril(diagonal=-1).sum(dim=-1) == 0)
    return (share[:, None] @ given[..., None])[..., 0], (share @ values[..., None])[..., 0], first


def _ranks(x: Tensor, pairs: Tensor) -> Tensor:
    """Mean ranks among the entries that count, from all pairs."""
    below = (x[..., None, :] < x[..., :, None]) & pairs
    ties = (x[..., None, :] == x[..., :, None]) & pairs
    return below.sum(dim=-1).double() + 0.5 * ties.sum(dim=-1).double()


def _correlation(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum(dim=-1, keepdim=True)
    x, y = (torch.where(kept, v - (v * kept).sum(-1, keepdim=True) / count.clamp_min(1), 0.0) for v in (x, y))
    scale = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(dim=-1) / scale, torch.nan)
