"""Selection of ranks under a strict budget by learned thresholds on singular values, ending in factorised layers."""

from typing import Literal

from lightning_plugins._grouping import Group, grouped
from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._trainer.phases import Phase
from lightning_plugins.compression.budget.filling import ChoiceRates, Limits


class RankScheduling(ScheduledCompression):
    """Learn which ranks a network's layers need within a budget, and factorise them, in one training.

    The phases are those of `HybridCompression`, without masks on channels: only weights become low-rank, and the
    number of channels stays. For ``cost="params"`` the module needs no ``example_input_array``.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can be split: linear
            layers and convolutions without groups.
        budget: The share of the whole network's cost that may be left, between 0 and 1.
        cost: ``"params"``, or ``"flops"`` of a forward pass of the ``example_input_array``.
        phase: When thresholds act (``begin``) and when the choice is made (``end``), in ``unit``, and its
            ``schedule``, the progress of the choice, by default a straight line from ``begin`` to ``end``.
        limits: Layers to keep as they are (``keep``), and possible ranks (``min_size``, ``multiple_of``); a
            `lightning_plugins.compression.Limits`.
        rates: Step size of ``thresholds``, ``beta_max``, and ``refresh_every``, the steps between two decompositions of
            the weights; a `lightning_plugins.compression.ChoiceRates`. Its other fields are those of masks.
        figures: Whether to draw ranks, cost and the network that is left, if matplotlib is installed.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Attributes:
        report: As that of `HybridCompression`.

    Logs at every step ``budget/<cost>`` and ``rank/<layer>``.

    Example:
        >>> callback = RankScheduling(layers="*", budget=0.5, cost="params")
        >>> callback.finished
        False

    Source:
        Our reading of DTL-S of Eo et al., https://arxiv.org/abs/2309.13077.
    """

    @grouped(
        phase=Phase,
        limits=Group(Limits, older={"min_rank": "min_size"}),
        rates=Group(
            ChoiceRates,
            older={"threshold_learning_rate": "thresholds"},
            new=("scores", "beta_max", "update_every"),
        ),
    )
    def __init__(
        self,
        layers: str | list[str],
        budget: float = 0.4,
        cost: Literal["params", "flops"] = "flops",
        *,
        phase: Phase = Phase(),
        limits: Limits = Limits(),
        rates: ChoiceRates = ChoiceRates(),
        figures: bool = True,
    ) -> None:
        super().__init__(
            CompressionSettings(
                layers=layers,
                budget=budget,
                cost=cost,
                phase=phase,
                limits=limits,
                rates=rates,
                figures=figures,
                ranks=True,
            )
        )
