"""State of an unknown kind in an optimizer is never mapped as if it were a gradient."""

import warnings
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import RankScheduling
from tests.callbacks.budgets import BATCHES, Model, in_steps, seeded
from tests.callbacks.test_surgery import Cut, Swap
from tests.callbacks.test_surgery import seeded as seeded_for_swap
from tests.models import fit


class Remembering(torch.optim.SGD):
    """SGD that remembers something of each parameter under a name of its own."""

    key, from_the_start = "mystery", False

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.from_the_start:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter][self.key] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if self.from_the_start:
                    state[self.key]  # as Adagrad's, which is there or the step fails
                state[self.key] = self.remember(parameter)
        return loss

    def remember(self, parameter: Tensor) -> Any:
        return parameter.detach().clone()


class Eager(Remembering):
    from_the_start = True


class OfGradients(Remembering):
    key = "prev_grad"

    def remember(self, parameter: Tensor) -> Any:
        return parameter.grad.clone()


class Boolean(Remembering):
    key = "sign"

    def remember(self, parameter: Tensor) -> Any:
        return parameter > 0


class Listing(Remembering):
    key = "history"

    def remember(self, parameter: Tensor) -> Any:
        return [parameter.detach().clone()]


class Lookahead(Remembering):
    key = "slow_buffer"


KINDS = [Remembering, Eager, OfGradients, Boolean, Listing, Lookahead]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_unknown_meaning_begins_afresh_with_a_warning(kind):
    swap = Swap()
    with pytest.warns(UserWarning, match=f"{kind.__name__} starts afresh for .* others.*{kind.key}"):
        fit(seeded_for_swap(configure=lambda model: kind(model.parameters(), lr=0.01)), BATCHES, [swap])
    for name in ("backbone.2.0.weight", "backbone.2.1.weight"):
        left = swap.after.get(name, {})
        assert all(not value.any() for value in left.values())
    assert swap.after["backbone.0.weight"]


@pytest.mark.parametrize("kind", [Remembering, Eager, OfGradients, Boolean, Lookahead])
def test_entries_that_are_picked_keep_their_state_whatever_it_means(kind):
    cut = Cut()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts afresh.*")
        fit(seeded_for_swap(configure=lambda model: kind(model.parameters(), lr=0.01)), BATCHES, [cut])
    torch.testing.assert_close(
        cut.after["backbone.0.weight"][kind.key], cut.before["backbone.0.weight"][kind.key][cut.kept]
    )


class Free(Model):
    """Trained without a schedule, by the rule that keeps a second copy of every weight."""

    kind: Any = schedulefree.AdamWScheduleFree

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.02)

    def on_train_epoch_start(self) -> None:
        self.optimizers().train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss))
        return loss


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_the_second_copy_of_a_weight_goes_on_from_the_weight(kind):
    model = seeded(Free)
    model.kind, model.losses = getattr(schedulefree, kind), []
    trainer = fit(model, BATCHES, [in_steps(RankScheduling, budget=0.6)], max_epochs=6)
    factor = (
        model.backbone[2][0].weight if isinstance(model.backbone[2], nn.Sequential) else model.backbone[0][0].weight
    )
    assert trainer.optimizers[0].state[factor]["z"].shape == factor.shape
    epochs = torch.tensor(model.losses).view(6, -1).mean(1)
    assert epochs[3:].max() <= epochs[2] + 0.1  # as it went on to rise before
