"""Estimates of mutual information: a critic is fitted to pairs and evaluated on other pairs, with many candidates."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_callable, check_instance, shown
from lightning_plugins.functional.class_information import class_entropy, class_posterior_information, infonce_ceiling
from lightning_plugins.functional.pair_scores import BoundWithError, candidate_bound
from lightning_plugins.information.critics import Critic
from lightning_plugins.information.fitting import CriticSettings, FittedCritic, check_pairs, fit_critic, shuffled_rows
from lightning_plugins.information.posterior import class_information, count_classes, fit_class_probe
from lightning_plugins.information.readings import EstimateSettings, MutualInformationEstimate, in_units


def evaluate_critic(
    critic: Critic | FittedCritic,
    x: Tensor,
    y: Tensor,
    *,
    labels: Tensor | None = None,
    settings: EstimateSettings | None = None,
) -> MutualInformationEstimate:
    """Evaluate a critic on unseen pairs, in blocks, with all pairs as candidates.

    Args:
        critic: As `fit_critic` returns it.
        x: Floating tensor of shape ``(N, d)``.
        y: Floating tensor of shape ``(N, e)``.
        labels: Class of each pair, for same-class pairs; shape ``(N,)``.
        settings: Bound, number of candidates and units; None for the defaults.

    Returns:
        The estimate, without the quantities that need further fits.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating tensor, or ``labels`` not integers.
        ValueError: If shapes do not fit, a value is not finite, or there are fewer pairs than candidates.

    Example:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> fitted = fit_critic(x, x.clone(), settings=CriticSettings(max_steps=0))
        >>> estimate = evaluate_critic(fitted, x[fitted.test_rows], x[fitted.test_rows])
        >>> 4 < estimate.estimate <= estimate.ceiling  # infinite, and read as nearly ln 700
        True
    """
    check_arguments(evaluate_critic, locals())
    chosen = EstimateSettings() if settings is None else settings
    check_pairs(x, y, fewest=2)
    module = critic.critic if isinstance(critic, FittedCritic) else critic
    found = _evaluate(module, x, y, chosen)
    entropy = class_ceiling = None
    if labels is not None:
        counts = count_classes("labels", labels, len(x))
        entropy = float(class_entropy(counts / counts.sum()))
        class_ceiling = infonce_ceiling(found.num_candidates, counts.cpu() / counts.sum().cpu())
    return in_units(
        MutualInformationEstimate(
            found.value,
            found.standard_error,
            "nats",
            chosen.bound,
            found.num_candidates,
            math.log(found.num_candidates),
            found.self_normalization,
            class_ceiling,
            entropy,
        ),
        chosen.units,
    )


def estimate_information(
    x: Tensor,
    y: Tensor,
    *,
    labels: Tensor | None = None,
    held_out: Sequence[Tensor] | None = None,
    settings: EstimateSettings | None = None,
) -> MutualInformationEstimate:
    """Fit a critic to pairs and evaluate it on other pairs.

    Args:
        x: Floating tensor of shape ``(N, d)``.
        y: Floating tensor of shape ``(N, e)``.
        labels: Class of each pair, shape ``(N,)``, for class-based limits.
        held_out: Pairs to evaluate on, ``(x, y)`` or ``(x, y, labels)``, made from other samples. By default
            ``settings.fit.test`` of the pairs are reserved, which is valid only if pairs do not share samples.
        settings: Critic, bound, number of candidates and units; None for the defaults.

    Returns:
        The estimate.

    Raises:
        TypeError: If a tensor is of the wrong type.
        ValueError: If shapes do not fit, values are not finite, or there are too few pairs.

    Example:
        >>> x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        >>> y = 0.8 * x + 0.6 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
        >>> settings = EstimateSettings(fit=CriticSettings(max_steps=0))
        >>> abs(estimate_information(x, y, settings=settings).estimate - 0.511) < 0.1  # -ln(1 - 0.64) / 2
        True
    """
    check_arguments(estimate_information, locals())
    if held_out is not None and not 2 <= len(held_out) <= 3:
        raise ValueError(f"`held_out` must be (x, y) or (x, y, labels), got {len(held_out)} entries")
    chosen = EstimateSettings() if settings is None else settings
    fit = chosen.fit if held_out is None else dataclasses.replace(chosen.fit, test=0.0)
    if held_out is None and fit.test == 0:
        raise ValueError("`settings.fit.test` must be positive without `held_out`: no pair is left for the estimate")
    if labels is not None:
        count_classes("labels", labels, len(x))
    fitted = fit_critic(x, y, chosen.critic, settings=fit)
    pairs = [part for part in (x, y, labels) if part is not None]
    left = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    left[fitted.test_rows] = True
    seen = [part[~left] for part in pairs]
    unseen = [part[left] for part in pairs] if held_out is None else held_out
    unseen_labels = unseen[2] if len(unseen) == 3 else None
    result = evaluate_critic(fitted, unseen[0], unseen[1], labels=unseen_labels, settings=chosen)
    if labels is not None and unseen_labels is not None:
        read, plug_in = _class_readings(seen, (*unseen[:2], unseen_labels), fit.seed)
        unit = 1 / math.log(2) if chosen.units == "bits" else 1.0
        result = dataclasses.replace(result, class_information=read * unit, class_posterior=plug_in * unit)
    if chosen.consistency:
        unit = math.log(2) if chosen.units == "bits" else 1.0
        tests = {name: nats / unit for name, nats in _consistency(seen[:2], unseen[:2], chosen, fit).items()}
        ratios = {name: value / result.estimate for name, value in tests.items() if name != "shuffled"}
        result = dataclasses.replace(result, consistency={"shuffled": tests["shuffled"], **ratios})
    return result


def check_device(device: torch.device | str | int) -> None:
    """Raise an error for an invalid device.

    Raises:
        TypeError: If it is of another type.
        ValueError: If there is no such device.
    """
    check_instance("device", device, (torch.device, str, int), "a device, its name or its number")
    try:
        torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"`device` must name a device, got {device!r}: {error}") from None


def estimate(
    encoder: Callable[[Tensor], Tensor],
    dataloader: Iterable[Sequence[Tensor]],
    *,
    held_out: Iterable[Sequence[Tensor]] | None = None,
    settings: EstimateSettings | None = None,
    device: torch.device | str = "cpu",
) -> MutualInformationEstimate:
    """Estimate the mutual information of the representations of two views, for a trained, frozen encoder.

    Args:
        encoder: Maps a batch of views to representations, which are flattened to one row per sample. A module is
            temporarily put in evaluation mode.
        dataloader: Batches ``(x, y)`` or ``(x, y, labels)`` to fit the critic to.
        held_out: Batches of other samples to evaluate on; by default the first ones are split, see
            `estimate_information`.
        settings: Critic, bound, number of candidates and units; None for the defaults.
        device: Device for the batches.

    Returns:
        The estimate.

    Raises:
        TypeError: If a batch is not a sequence of tensors.
        ValueError: If there is no batch, or the pairs do not fit.

    Example:
        >>> from lightning_plugins.data import SameClassPairs
        >>> x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] > 0).long()
        >>> pairs = SameClassPairs(x, labels, generator=torch.Generator().manual_seed(0))
        >>> loader = torch.utils.data.DataLoader(pairs, batch_size=100)
        >>> found = estimate(torch.nn.Identity(), loader, settings=EstimateSettings(fit=CriticSettings(max_steps=50)))
        >>> round(found.entropy, 1), found.estimate < found.ceiling
        (0.7, True)
    """
    check_callable("encoder", encoder, "a network or function from views to representations")
    given = {"dataloader": dataloader} if held_out is None else {"dataloader": dataloader, "held_out": held_out}
    for name, batches in given.items():
        if isinstance(batches, str | bytes | Tensor) or not isinstance(batches, Iterable):
            raise TypeError(f"`{name}` must be a DataLoader or another iterable of batches, got {shown(batches)}")
    if settings is not None:
        check_instance("settings", settings, EstimateSettings, "an EstimateSettings or None")
    if device is not None:
        check_device(device)
    x, y, labels = embed_pairs(encoder, dataloader, device)
    others: list[Tensor] | None = None
    if held_out is not None:
        others = [part for part in embed_pairs(encoder, held_out, device) if part is not None]
    return estimate_information(x, y, labels=labels, held_out=others, settings=settings)


def embed_pairs(
    encoder: Callable[[Tensor], Tensor], batches: Iterable[Sequence[Tensor]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode both sides of all pairs.

    Args:
        encoder: Maps a batch of views to representations.
        batches: ``(x, y)`` or ``(x, y, labels)`` each.
        device: Device for the batches.

    Returns:
        Representations of both sides, shape ``(N, d)`` each, and the labels or None.

    Raises:
        TypeError: If a batch is not a sequence of tensors.
        ValueError: If there is no batch, or it has one tensor.
    """
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    with torch.no_grad(), _in_evaluation(encoder):
        for batch in batches:
            if not isinstance(batch, Sequence) or len(batch) < 2:
                raise TypeError(f"`dataloader` must give (x, y) or (x, y, labels), got {type(batch).__name__}")
            for part, view in zip(parts, batch[:2], strict=False):
                part.append(encoder(view.to(device)).flatten(start_dim=1).float())
            if len(batch) > 2:
                parts[2].append(batch[2].to(device))
    if not parts[0]:
        raise ValueError("`dataloader` must give at least one batch, got none")
    return torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2]) if parts[2] else None


def _evaluate(critic: Critic, x: Tensor, y: Tensor, settings: EstimateSettings) -> BoundWithError:
    order = shuffled_rows(x, y, settings.fit.seed)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        one, other = critic.encode(x[order].float(), y[order].float())
        return candidate_bound(
            one,
            other,
            critic.score,
            bound=settings.bound,
            num_candidates=settings.num_candidates,
            max_anchors=settings.max_anchors,
            clip=settings.clip,
        )


def _class_readings(seen: Sequence[Tensor], unseen: Sequence[Tensor], seed: int) -> tuple[float, float]:
    """Class information and the posterior plug-in, in nats."""
    classes = int(max(seen[2].max(), unseen[2].max())) + 1
    probes = [fit_class_probe(side, seen[2], num_classes=classes, seed=seed) for side in seen[:2]]
    read = min(class_information(probe, side, unseen[2]) for probe, side in zip(probes, unseen[:2], strict=True))
    counts = count_classes("labels", seen[2], len(seen[2]), classes)
    drawn = counts > 0  # posteriors of classes with zero probability are undefined
    posteriors = [probe.log_posteriors(side)[:, drawn] for probe, side in zip(probes, unseen[:2], strict=True)]
    posteriors = [one - one.logsumexp(dim=1, keepdim=True) for one in posteriors]
    return read, float(class_posterior_information(posteriors[0], posteriors[1], counts[drawn] / counts.sum()))


def _consistency(
    seen: Sequence[Tensor], unseen: Sequence[Tensor], settings: EstimateSettings, fit: CriticSettings
) -> dict[str, float]:
    """The estimates, in nats, after three modifications of the pairs with known effect on the information."""

    def value(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> float:
        critic = fit_critic(*change(*seen), settings.critic, settings=dataclasses.replace(fit, test=0.0)).critic
        return _evaluate(critic, *change(*unseen), settings).value

    def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = shuffled_rows(x, y, fit.seed + 1)
        return x[rows], y[rows.roll(1)]

    def two_copies(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = shuffled_rows(x, y, fit.seed + 1)[: len(x) // 2 * 2]  # in random order: two independent halves
        one, other = rows.chunk(2)
        return torch.cat([x[one], x[other]], dim=1), torch.cat([y[one], y[other]], dim=1)

    def function_of_y(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.cat([y, y.sin()], dim=1)

    changes = {"shuffled": shuffled, "function of y": function_of_y, "two copies": two_copies}
    return {name: value(change) for name, change in changes.items()}


@contextmanager
def _in_evaluation(encoder: object) -> Iterator[None]:
    if not isinstance(encoder, nn.Module):
        yield
        return
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
