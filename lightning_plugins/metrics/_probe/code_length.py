"""Code lengths of the targets, from the moments of folds transmitted one after the other."""

import math

import torch
from torch import Tensor

from lightning_plugins.functional.evidence import evidence_at, log_evidence
from lightning_plugins.functional.ridge import RidgeSystem, ridge_system
from lightning_plugins.metrics._probe.moments import mean_and_scale, standardised

_NULL = 0.5 * math.log(2 * math.pi * math.e)  # nats per standardised target under its own Gaussian


def description_length(folds: Tensor, num_features: int) -> Tensor:
    """Length of a prequential code of the targets, in nats per row.

    Targets are scaled to mean 0 and variance 1, so that a code without other information takes 1.419 nats per row. The
    first fold is coded that way; each later one with the predictive distribution of a Bayesian linear regression whose
    precisions maximise the evidence on the preceding folds.

    Args:
        folds: Moments of the folds with rows, shape ``(F, p, p)``.
        num_features: ``d``.

    Returns:
        Tensor of shape ``(k,)``; negative for almost fully informative features, since densities are coded.
    """
    total = folds.sum(dim=0)
    mean, scale = mean_and_scale(total, folds.shape[-1] - 1)
    blocks = [standardised(fold, mean, scale) for fold in folds]
    y = slice(1 + num_features, None)
    first = blocks[0]
    length = 0.5 * (math.log(2 * math.pi) * first[0, 0] + first[y, y].diagonal())
    seen = first
    known = _system(seen, num_features)
    for block in blocks[1:]:
        squares, n = seen[y, y].diagonal(), seen[0, 0]
        best = log_evidence(known.eigenvalues, known.projections, squares, n)
        ratio, precision = best.ratio[None], best.noise_precision
        seen = seen + block
        both = _system(seen, num_features)
        after = evidence_at(both.eigenvalues, both.projections, seen[y, y].diagonal(), seen[0, 0], ratio, precision)[0]
        length = length - (after - best.log_evidence)
        known = both
    return length / total[0, 0]


def null_length() -> float:
    """Nats per row of a standardised target without features."""
    return _NULL


def _system(sums: Tensor, num_features: int) -> RidgeSystem:
    x, y = slice(1, 1 + num_features), slice(1 + num_features, None)
    return ridge_system(sums[x, x], sums[x, y])


def evidence_per_row(sums: Tensor, system: RidgeSystem, num_features: int) -> Tensor:
    """Largest log evidence in nats per row of centred targets, shape ``(k,)``: LogME of centred features."""
    squares = sums.diagonal()[1 + num_features :]
    scale = (squares / sums[0, 0]).sqrt().clamp_min(torch.finfo(sums.dtype).tiny)
    found = log_evidence(system.eigenvalues, system.projections / scale, squares / scale.square(), sums[0, 0])
    return found.log_evidence / sums[0, 0] - scale.log()
