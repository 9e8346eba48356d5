"""Rank correlation of attention with a property of the attended tokens."""

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

    The mask excludes special tokens and padding. Positions with the same token (pieces of one word and repeated words,
    if ``tokens`` numbers words) form one entry, with their mean attention and mean value. Ties share their mean rank.

    Args:
        attention: Shape ``(N, heads, L, L)``, query before key.
        values: The property of every key, shape ``(N, L)``; masked values may be anything.
        mask: Boolean or 0/1 of shape ``(N, L)``: keys to include. By default all but the query itself.
        tokens: Integers of shape ``(N, L)``: which positions hold the same token. By default every position is
            separate.
        query: Position of the query; 0 is the CLS token.

    Returns:
        Tensor of shape ``(N, heads)`` in ``[-1, 1]``, float64; NaN for a text with fewer than two entries, or with
        constant values or attention.

    Raises:
        TypeError: If ``attention`` is not a floating tensor.
        ValueError: If the shapes do not match, or the query is not one of the positions.

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
        check_real(name, given)  # type: ignore[arg-type]  # None raises an error here
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
    """Means over positions of the same token, stored at the first of them; the others are excluded."""
    same = (tokens[:, :, None] == tokens[:, None, :]) & kept[:, :, None] & kept[:, None, :]
    share = same.double() / same.sum(dim=-1, keepdim=True).clamp_min(1)
    first = kept & (same.tril(diagonal=-1).sum(dim=-1) == 0)
    return (share[:, None] @ given[..., None])[..., 0], (share @ values[..., None])[..., 0], first


def _ranks(x: Tensor, pairs: Tensor) -> Tensor:
    """Mean ranks among the included entries, from all pairs."""
    below = (x[..., None, :] < x[..., :, None]) & pairs
    ties = (x[..., None, :] == x[..., :, None]) & pairs
    return below.sum(dim=-1).double() + 0.5 * ties.sum(dim=-1).double()


def _correlation(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    count = kept.sum(dim=-1, keepdim=True)
    x, y = (torch.where(kept, v - (v * kept).sum(-1, keepdim=True) / count.clamp_min(1), 0.0) for v in (x, y))
    scale = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(dim=-1) / scale, torch.nan)
