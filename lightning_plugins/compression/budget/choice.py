"""The selection of channels and ranks over training: its phases and its steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice_optimizer import ChoiceOptimizer
from lightning_plugins.compression.budget.filling import ChoiceRates

_SETTLED = 0.9  # of the way, from which on the cost is that of the budget


class Choice:
    """Scores and thresholds under a budget that is met at every step, whatever trains the network.

    Call `act` before the forward pass, `step` between the backward pass and the optimizer's step, and `harden` at the
    end.

    Args:
        network: The network, with masks and thresholds on.
        rates: How fast they move.

    Attributes:
        done: The part of the reduction that has been reached.
    """

    def __init__(self, network: BudgetedNetwork, rates: ChoiceRates) -> None:
        self.network, self.rates = network, rates
        self.optimizer = ChoiceOptimizer(network.kinds())
        self.done, self._beta = 0.0, 1.0

    def act(self, way: float) -> None:
        """Set masks and thresholds to their state at a point of the choice.

        Args:
            way: How far, in [0, 1]: the inverse temperature is ``beta_max ** way``. The cost follows a cubic schedule,
                fast at first, so that the network has time to recover; in the last tenth of the way it stays at the
                budget.
        """
        self.done, self._beta = 1 - (1 - min(way / _SETTLED, 1.0)) ** 3, float(self.rates.beta_max**way)
        self.network.be_soft(self._beta)

    def look(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of the whole network, before the selection begins.

        Returns:
            As `step`: 1 as the share of the cost, and the full ranks.
        """
        network = self.network
        network.scores.saliency.observe(None)
        one = torch.ones_like(network.shift.total)
        return one, {name: one * size for name, size in network.shift.sizes.items()}

    def step(self, unscale: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step with the gradients of weights, scores and thresholds; all processes call.

        Args:
            unscale: What the gradients of scores and thresholds are multiplied by.

        Returns:
            The fraction of the cost that is left, a scalar, and the ranks by layer.
        """
        network, rates = self.network, self.rates
        spectra = network.spectra()  # taken before the scores move, which would make them outdated
        # Scores are counted in logits of the masks: steps at a high temperature would throw channels open and closed.
        of_thresholds = [rates.thresholds] if network.thresholds is not None else []
        of_scores = [rates.scores / self._beta] * (len(self.optimizer.counts) - len(of_thresholds))
        network.follow_saliency(unscale)
        self.optimizer.step(of_scores + of_thresholds, unscale)
        return network.shift.settle(spectra, self.done)

    def harden(self) -> Projection:
        """Choose within the budget; masks are zeros and ones from now on.

        Returns:
            What stays.
        """
        choice = self.network.choose()
        self.network.be_hard(choice.kept)
        return choice

    def state_dict(self) -> dict[str, Any]:
        """The state of the network's choice and of the optimizer, as tensors and primitives."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
