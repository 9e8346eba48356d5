"""Bounds on the mutual information with very many candidates, from blocks of the score matrix."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._checks import check_callable, check_choice, check_instance, check_positive_int
from lightning_plugins.functional.information import check_clip
from lightning_plugins.functional.tensors import check_dims, check_floating, check_real, check_shape

BOUNDS = ("infonce", "dv", "nwj", "smile")
_ROWS, _COLUMNS = 1024, 4096  # size of a block of scores


class PairScores(NamedTuple):
    """Statistics of the scores of all anchors with all candidates, sufficient for the bounds.

    Attributes:
        positives: Score of each anchor with its own partner, shape ``(A,)``.
        negatives: Log-sum-exp of its scores with the other candidates of each group, shape ``(A, G)``.
        anchor_groups: Group of each anchor's own pair, shape ``(A,)``.
        group_sizes: Number of candidates in each group, shape ``(G,)``.
    """

    positives: Tensor
    negatives: Tensor
    anchor_groups: Tensor
    group_sizes: Tensor


class BoundWithError(NamedTuple):
    """A bound and its standard error.

    Attributes:
        value: In nats.
        standard_error: By a jackknife that leaves out groups of pairs, as anchors and as candidates; NaN for fewer
            than four pairs.
        self_normalization: ``ln mean_{i != j} exp(f_ij)`` in nats; 0 for the logarithm of the true density ratio.
        num_candidates: K.
    """

    value: float
    standard_error: float
    self_normalization: float
    num_candidates: int


def pair_scores(
    x: Tensor,
    y: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    num_groups: int = 20,
    max_anchors: int | None = None,
    clip: float = math.inf,
) -> PairScores:
    """Score all anchors with all candidates in blocks; needs memory for one block.

    Args:
        x: Anchors, shape ``(N, ...)``.
        y: Their partners, shape ``(N, ...)``; together they are the candidates of every anchor.
        score: Maps ``n`` rows of ``x`` and ``m`` rows of ``y`` to scores of shape ``(n, m)``.
        num_groups: Number of groups of consecutive pairs for the standard error, at most half the number of pairs. The
            order of the pairs should be random.
        max_anchors: Maximum number of anchors, evenly spaced; all pairs remain candidates.
        clip: Scores with other candidates than the partner are clipped to ``[-clip, clip]``.

    Returns:
        The sums, in float64.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If ``x`` and ``y`` do not have the same number of rows, at least 2.

    Example:
        >>> pairs = pair_scores(torch.eye(3), torch.eye(3), lambda x, y: x @ y.T)
        >>> pairs.positives
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    check_pairs(x, y)
    check_callable("score", score, "a function of x and y to their scores (n, m)")
    check_clip(clip)
    clip = float(clip)
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"`x` and `y` must have the same number of rows, at least 2 (with K = 1 there is nothing to tell the pair "
            f"from), got {len(x)} and {len(y)}"
        )
    n, device = len(x), x.device
    groups = max(1, min(check_positive_int("num_groups", num_groups), n // 2))
    bounds = [n * g // groups for g in range(groups + 1)]
    count = n if max_anchors is None else min(n, check_positive_int("max_anchors", max_anchors))
    anchors = torch.arange(count, device=device) * n // count
    positives = torch.empty(count, dtype=torch.float64, device=device)
    negatives = torch.full((count, groups), -torch.inf, dtype=torch.float64, device=device)
    for start in range(0, count, _ROWS):
        own = anchors[start : start + _ROWS]
        rows = slice(start, start + len(own))
        for group in range(groups):
            for left in range(bounds[group], bounds[group + 1], _COLUMNS):
                right = min(left + _COLUMNS, bounds[group + 1])
                block = score(x[own], y[left:right])
                check_floating("score", block)
                check_shape("score", block, (len(own), right - left))
                if block.dtype in {torch.float16, torch.bfloat16}:
                    block = block.float()
                partner = own[:, None] == torch.arange(left, right, device=device)
                here = partner.any(dim=1)
                found = torch.where(partner, block, 0.0).sum(dim=1).double()
                positives[rows] = torch.where(here, found, positives[rows])
                limit = clip if clip <= torch.finfo(block.dtype).max else math.inf
                rest = block.clamp(-limit, limit).masked_fill(partner, -torch.inf).logsumexp(dim=1).double()
                negatives[rows, group] = torch.logaddexp(negatives[rows, group], rest)
    edges = torch.tensor(bounds, device=device)
    return PairScores(positives, negatives, torch.bucketize(anchors, edges[1:], right=True), edges.diff())


def check_pairs(x: Tensor, y: Tensor) -> None:
    """Raise an error unless both are tensors with rows.

    Raises:
        TypeError: If one is not a tensor of real numbers.
        ValueError: If one has no dimension.
    """
    for name, rows in (("x", x), ("y", y)):
        check_real(name, rows)
        check_dims(name, rows, 1, "(N, ...)")


def bound_from_pairs(pairs: PairScores, bound: str = "infonce") -> BoundWithError:
    """Compute a bound and its standard error from blocks of scores.

    Args:
        pairs: As `pair_scores` returns them; for ``"smile"`` with its ``clip``.
        bound: ``"infonce"``, ``"dv"`` (Donsker and Varadhan), ``"nwj"``, or ``"smile"``, the same formula as
            ``"dv"`` of clipped scores.

    Returns:
        The bound; with ``"infonce"`` it is at most ``ln K``.

    Raises:
        ValueError: If ``bound`` is unknown.

    Example:
        >>> pairs = pair_scores(50 * torch.eye(8), torch.eye(8), lambda x, y: x @ y.T)
        >>> round(bound_from_pairs(pairs).value, 4)  # ln 8
        2.0794
    """
    check_instance("pairs", pairs, PairScores, "what `pair_scores` returns")
    check_choice("bound", bound, BOUNDS)
    everything = torch.ones_like(pairs.group_sizes, dtype=torch.bool)
    value, normalization = _bound(pairs, bound, everything)
    groups = len(pairs.group_sizes)
    error = math.nan
    if groups >= 2:
        left_out = []
        for group in range(groups):
            kept = everything.clone()
            kept[group] = False
            left_out.append(_bound(pairs, bound, kept)[0])
        values = torch.stack(left_out)
        error = float(((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt())
    return BoundWithError(float(value), error, float(normalization), int(pairs.group_sizes.sum()))


def candidate_bound(
    x: Tensor,
    y: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    bound: str = "infonce",
    num_candidates: int | None = None,
    max_anchors: int | None = None,
    clip: float = math.inf,
) -> BoundWithError:
    """Compute a bound from pairs with any number of candidates, in blocks.

    Args:
        x: Anchors, shape ``(N, ...)``, in random order.
        y: Their partners, shape ``(N, ...)``.
        score: Maps ``n`` rows of ``x`` and ``m`` rows of ``y`` to scores of shape ``(n, m)``.
        bound: ``"infonce"``, ``"dv"``, ``"nwj"`` or ``"smile"``.
        num_candidates: K; by default all pairs are candidates. With fewer, the pairs are split into ``N // K`` batches
            of K, the remainder is dropped, and the bound is the mean over the batches, as in training.
        max_anchors: Maximum number of anchors in each batch of candidates.
        clip: For ``"smile"``.

    Returns:
        The bound and its standard error; for several batches that of their mean.

    Raises:
        TypeError: If ``num_candidates`` is not an int.
        ValueError: If ``num_candidates`` is less than 2 or more than there are pairs, or ``bound`` is unknown.

    Example:
        >>> x = torch.eye(8)
        >>> round(candidate_bound(x, 50 * x, lambda x, y: x @ y.T, num_candidates=4).value, 4)  # ln 4
        1.3863
    """
    check_choice("bound", bound, BOUNDS)
    k = len(x) if num_candidates is None else check_positive_int("num_candidates", num_candidates)
    if k < 2 or k > max(len(x), 2):
        raise ValueError(
            f"`num_candidates` must be in [2, {len(x)}], from two to all of the pairs, got {num_candidates}"
        )
    clip = clip if bound == "smile" else math.inf
    batches = max(len(x) // k, 1)
    parts = []
    for start in range(0, batches * k, k):
        rows = slice(start, start + k)
        parts.append(bound_from_pairs(pair_scores(x[rows], y[rows], score, max_anchors=max_anchors, clip=clip), bound))
    if batches == 1:
        return parts[0]
    values = torch.tensor([part.value for part in parts], dtype=torch.float64)
    normalization = torch.tensor([part.self_normalization for part in parts], dtype=torch.float64).mean()
    return BoundWithError(float(values.mean()), float(values.std() / math.sqrt(batches)), float(normalization), k)


def row_keys(x: Tensor, y: Tensor) -> Tensor:
    """Hash the bits of each pair, for a random order independent of the order of rows and of processes.

    Args:
        x: Floating tensor of shape ``(N, d)``.
        y: Floating tensor of shape ``(N, e)``.

    Returns:
        int64 tensor of shape ``(N,)``; equal pairs have equal keys.

    Example:
        >>> x = torch.arange(6.0).view(3, 2)
        >>> bool((row_keys(x, x)[[2, 0, 1]] == row_keys(x[[2, 0, 1]], x[[2, 0, 1]])).all())
        True
    """
    bits = torch.cat([x, y], dim=1).float().contiguous().view(torch.int32).long()
    column = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return _mixed((_mixed(bits + column * 0x1E3779B97F4A7C15)).sum(dim=1))  # integer sums are exact in any order


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64, with products modulo ``2**64``."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _bound(pairs: PairScores, bound: str, kept: Tensor) -> tuple[Tensor, Tensor]:
    own = kept[pairs.anchor_groups]
    positives, negatives = pairs.positives[own], pairs.negatives[own][:, kept].logsumexp(dim=1)
    k = int(pairs.group_sizes[kept].sum())
    normalization = negatives.logsumexp(dim=0) - math.log(len(positives) * max(k - 1, 1))
    if bound == "infonce":
        value = math.log(k) + (positives - torch.logaddexp(positives, negatives)).mean()
    elif bound == "nwj":
        value = positives.mean() - (normalization - 1).exp()
    else:
        value = positives.mean() - normalization
    return value, normalization
