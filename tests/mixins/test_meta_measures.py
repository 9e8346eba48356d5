"""Losses and metrics of few-shot tasks over batches of several loaders, against means over all tasks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MetricCollection

from lightning_plugins.meta import Episodes
from lightning_plugins.mixins._meta_measures import Measures


def episodes(tasks: int, seed: int, *, ragged: bool = False) -> tuple[Episodes, Any]:
    """Results of tasks, of different numbers of query samples or not, and what was wanted."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(tasks, generator=generator, requires_grad=True)
    outputs = [torch.randn(4 + ragged * task, 1, generator=generator, requires_grad=True) for task in range(tasks)]
    targets = [torch.randn(output.shape, generator=generator) for output in outputs]
    if ragged:
        return Episodes(losses.mean(), losses, outputs), targets
    return Episodes(losses.mean(), losses, torch.stack(outputs)), torch.stack(targets)


def of_all(found: list[tuple[Episodes, Any]]) -> tuple[Tensor, Tensor]:
    """The mean loss of a task, and the mean distance of an output from its target."""
    losses = torch.cat([part.losses for part, _ in found])
    away = [(o - t).abs().flatten() for part, targets in found for o, t in zip(part.outputs, targets, strict=True)]
    return losses.detach().mean(), torch.cat(away).detach().mean()


@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
def test_every_loader_has_the_mean_over_its_own_tasks(ragged: bool):
    measures = Measures("val", MetricCollection({"distance": MeanAbsoluteError()}))
    given = {loader: [episodes(tasks, 10 * loader + tasks, ragged=ragged) for tasks in (2, 5)] for loader in range(3)}
    for loader, found in given.items():
        for number, (part, targets) in enumerate(found, 1):
            named = measures.updated(part, targets, loader)
            loss, distance = of_all(found[:number])
            assert set(named) == {"val/loss", "val/distance"}
            torch.testing.assert_close(named["val/loss"].compute(), loss.double())
            torch.testing.assert_close(named["val/distance"].compute(), distance)
            assert len(measures.losses) == len(measures.metrics) == loader + 1


def test_without_metrics_the_loss_alone_is_measured():
    measures = Measures("test", None)
    part, targets = episodes(3, 0)
    for loader in (0, 1):
        named = measures.updated(part, targets, loader)
        assert list(named) == ["test/loss"]
        torch.testing.assert_close(named["test/loss"].compute(), part.losses.detach().double().mean())
    assert measures.losses[0] is not measures.losses[1]


def test_a_loader_that_comes_first_with_a_higher_number_has_a_place():
    measures = Measures("val", None)
    part, targets = episodes(2, 1)
    assert measures.updated(part, targets, 2)["val/loss"] is measures.losses[2]
