"""Curves of a model's score while the most, or least, relevant positions of a map are removed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_bool, check_callable, check_choice, check_positive_int
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.functional.attribution.positions import maps_of_inputs, with_channels
from lightning_plugins.functional.attribution.random import random_bits, sample_keys
from lightning_plugins.functional.attribution.replacement import (
    Patches,
    Perturbation,
    checked_perturbation,
    lines,
    replacements,
)
from lightning_plugins.functional.attribution.scoring import (
    MAX_FORWARD_BATCH,
    OUTPUTS,
    Forward,
    Output,
    checked_target,
    class_scores,
    score_copies,
)
from lightning_plugins.functional.tensors import check_floating

Order = Literal["most", "least"]
ORDERS: tuple[Order, ...] = ("most", "least")


@dataclass(frozen=True, kw_only=True)
class CurveSteps:
    """Points of a `perturbation_curve`, after the first.

    Attributes:
        count: Number of points, one patch each, at least 1; None for the number of patches. With more steps than
            patches the last points have all patches replaced.
        spread: Whether the steps are spread evenly, so that the last one replaces all patches.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> CurveSteps(count=10, spread=True).count
        10
    """

    count: int | None = None
    spread: bool = False

    def __post_init__(self) -> None:
        check_bool("spread", self.spread)
        if self.count is not None:
            object.__setattr__(self, "count", check_positive_int("count", self.count))


@grouped(steps=Group(CurveSteps, main="count"))
def perturbation_curve(
    forward: Forward,
    inputs: Tensor,
    attributions: Tensor,
    target: Tensor,
    *,
    perturbation: Perturbation | None = None,
    order: Order = "most",
    steps: int | CurveSteps | None = None,
    output: Output = "probability",
    max_forward_batch: int = MAX_FORWARD_BATCH,
) -> Tensor:
    """Score inputs while patches are replaced one by one, in the order of their summed attribution.

    All copies of all samples are evaluated in as few passes as ``max_forward_batch`` allows; the split into passes or
    batches only affects rounding. Tied patches are ordered at random per sample, identically for both orders.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``; in evaluation mode.
        inputs: Shape ``(B, [C,] *spatial)``; two dimensions are ``(B, L)``.
        attributions: The same shape, with any number of channels or without that dimension.
        target: Class of each sample, integers of shape ``(B,)``.
        perturbation: How patches are replaced; by default `Perturbation()`.
        order: ``"most"`` replaces the most relevant patches first (MoRF), ``"least"`` the least relevant (LeRF).
        steps: Number of points after the first, one patch each; by default the number of patches. `CurveSteps` also
            spreads them evenly over the patches.
        output: ``"probability"`` of the class, or its ``"logit"``.
        max_forward_batch: Maximum number of inputs in one forward pass.

    Returns:
        Scores of shape ``(B, steps + 1)``, starting with the unchanged inputs; NaN for a sample with a non-finite map.

    Raises:
        TypeError: If a tensor is of the wrong kind.
        ValueError: If shapes do not match or an argument is out of its range.

    Example:
        >>> def forward(x):  # the sum of the first half against that of the second
        ...     return torch.stack([x[:, :2].sum(1), x[:, 2:].sum(1)], 1)
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> perturbation_curve(forward, x, x, torch.tensor([0]), perturbation=Perturbation(1, "zero"), output="logit")
        tensor([[3., 1., 0., 0., 0.]])

    Source:
        Samek et al., TNNLS 2017, https://arxiv.org/abs/1509.06321; Schulz et al., ICLR 2020; Suh et al., arXiv
        2211.12702.
    """
    check_choice("order", order, ORDERS)
    limit = check_positive_int("max_forward_batch", max_forward_batch)
    check_callable("forward", forward, "a function from inputs to logits")
    check_choice("output", output, OUTPUTS)
    number, spread = (steps.count, steps.spread) if isinstance(steps, CurveSteps) else (steps, False)
    how = checked_perturbation(perturbation, Perturbation())
    maps, x = maps_of_inputs(attributions, inputs), with_channels(inputs.detach())
    target = checked_target(target, len(x)).to(x.device)
    patches, keys = Patches(tuple(x.shape[2:]), how.patch, x.device), sample_keys(x)
    places = patch_places(patches.sums(maps), keys, order=order, seed=how.seed)
    counts, point = steps_of(patches.count, number, spread=spread).unique(return_inverse=True)  # avoid duplicates

    def as_given(copies: Tensor) -> Tensor:
        return copies[:, 0] if inputs.ndim == 2 else copies

    if how.sequential:
        curve = _sequential(lambda c: forward(as_given(c)), x, places, patches, counts.tolist(), target, limit, output)
    else:
        counts = counts.to(x.device)
        replaced, place = replacements(x, how, patches, keys), places[:, patches.ids]

        def make(samples: Tensor, points: Tensor) -> Tensor:
            gone = place[samples] < counts[points].reshape(-1, *[1] * (place.ndim - 1))
            return as_given(torch.where(gone[:, None], replaced[samples], x[samples]))

        curve = score_copies(forward, make, target, len(counts), limit, output)
    finite = torch.isfinite(maps).flatten(1).all(1)
    if len(point) > curve.shape[1]:
        curve = curve[:, point.to(x.device)]
    return torch.where(finite[:, None], curve, torch.nan)


def patch_places(sums: Tensor, keys: Tensor, *, order: Order = "most", seed: int = 0) -> Tensor:
    """Number the patches of each sample in the order of their removal.

    Args:
        sums: Attribution of each patch, shape ``(B, patches)``.
        keys: int64 tensor of shape ``(B,)``, which determines the order of tied patches.
        order: ``"most"`` or ``"least"`` relevant first.
        seed: Seed of that order.

    Returns:
        Integers of shape ``(B, patches)``: 0 for the patch removed first.

    Example:
        >>> patch_places(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([0]))
        tensor([[2, 0, 1]])
    """
    shuffled = random_bits(keys, sums.shape[1], seed=seed + 500).argsort(1)
    drawn = sums.gather(1, shuffled).argsort(dim=1, descending=order == "most", stable=True)
    return shuffled.gather(1, drawn).argsort(1)


def steps_of(patches: int, steps: int | None, *, spread: bool) -> Tensor:
    """The number of patches that are replaced at each point of a curve.

    Args:
        patches: Number of patches.
        steps: Points after the first; by default the number of patches.
        spread: Whether they are spread over all patches.

    Returns:
        Integers of shape ``(steps + 1,)``, increasing from 0.

    Raises:
        TypeError: If ``steps`` is not an int.
        ValueError: If it is less than 1.

    Example:
        >>> steps_of(6, 4, spread=False), steps_of(6, 4, spread=True)
        (tensor([0, 1, 2, 3, 4]), tensor([0, 2, 3, 5, 6]))
    """
    count = patches if steps is None else check_positive_int("steps", steps)
    points = torch.arange(count + 1)
    return (points * patches + count // 2) // count if spread else points.clamp_max(patches)


def check_curves(name: str, curves: Tensor) -> None:
    """Raise an error unless there are at least two points along the last dimension.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If there are less than two points.
    """
    check_floating(name, curves)
    if curves.ndim == 0 or curves.shape[-1] < 2:
        raise ValueError(f"`{name}` must have shape (..., points) with at least 2 points, got {tuple(curves.shape)}")


def curve_area(curves: Tensor) -> Tensor:
    """Area under a curve by the trapezoidal rule, with a unit interval from its first to its last point.

    Args:
        curves: Shape ``(..., steps + 1)``, at least two points.

    Returns:
        Shape ``(...)``.

    Example:
        >>> curve_area(torch.tensor([1.0, 0.5, 0.0]))
        tensor(0.5000)
    """
    check_curves("curves", curves)
    return torch.trapezoid(curves, dim=-1) / (curves.shape[-1] - 1)


def degradation_score(least: Tensor, most: Tensor, *, reduction: Literal["sum", "mean"] = "mean") -> Tensor:
    """Area between the mean curves of a class, each scaled to fall from 1 to 0.

    Args:
        least: Mean probabilities with the least relevant patches removed first (LeRF), shape ``(..., steps + 1)``.
        most: The same with the most relevant ones first (MoRF).
        reduction: ``"sum"`` over the points, as published, or their ``"mean"``.

    Returns:
        Shape ``(...)``; NaN if a curve ends at its initial value, since it cannot be scaled.

    Raises:
        ValueError: If the shapes differ or ``reduction`` is not known.

    Example:
        >>> degradation_score(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), reduction="sum")
        tensor(1.)

    Source:
        Suh et al., arXiv 2211.12702; Schulz et al., ICLR 2020, https://arxiv.org/abs/2001.00396.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    check_curves("least", least)
    check_curves("most", most)
    if least.shape != most.shape:
        raise ValueError(f"`least` and `most` must have the same shape, got {tuple(least.shape)}, {tuple(most.shape)}")
    gap = scaled_curve(least) - scaled_curve(most)
    return gap.sum(-1) if reduction == "sum" else gap.mean(-1)


def scaled_curve(curve: Tensor) -> Tensor:
    """Scale a curve so that it starts at 1 and ends at 0.

    Args:
        curve: Shape ``(..., points)``.

    Returns:
        The same shape; NaN where first and last point are equal up to rounding.

    Example:
        >>> scaled_curve(torch.tensor([0.9, 0.7, 0.1]))
        tensor([1.0000, 0.7500, 0.0000])
    """
    check_curves("curve", curve)
    first, last = curve[..., :1], curve[..., -1:]
    fall = first - last
    flat = fall.abs() <= 8 * torch.finfo(curve.dtype).eps * first.abs().maximum(last.abs())
    return torch.where(flat, torch.nan, (curve - last) / torch.where(flat, 1.0, fall))


def _sequential(
    forward: Forward,
    x: Tensor,
    places: Tensor,
    patches: Patches,
    counts: list[int],
    target: Tensor,
    limit: int,
    output: Output,
) -> Tensor:
    """Replace patches one after the other by lines between their current neighbours."""
    columns: list[Tensor] = []
    for samples in torch.arange(len(x), device=x.device).split(limit):
        state, done = x[samples], 0
        waiting: list[Tensor] = []
        rows: list[Tensor] = []
        for count in counts:
            while done < count:
                now = (places[samples][:, patches.ids] == done)[:, None]
                state = torch.where(now, lines(state, patches, state), state)
                done += 1
            if waiting and (len(waiting) + 1) * len(samples) > limit:
                rows.append(_score_states(forward, waiting, target[samples], output))
                waiting = []
            waiting.append(state)
        rows.append(_score_states(forward, waiting, target[samples], output))
        columns.append(torch.cat(rows).T)
    return torch.cat(columns) if columns else torch.zeros(0, len(counts), device=x.device)


def _score_states(forward: Forward, states: list[Tensor], target: Tensor, output: Output) -> Tensor:
    scores = class_scores(forward, torch.cat(states), target.repeat(len(states)), output=output)
    return scores.reshape(len(states), -1)
