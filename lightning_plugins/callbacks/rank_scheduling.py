"""Selection of ranks under a strict budget by learned thresholds on singular values, ending in factorised layers."""

from typing import Literal

from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.schedules import Schedule


class RankScheduling(ScheduledCompression):
    """Learn which ranks a network's layers need within a budget, and factorise them, in one training.

    The phases are those of `HybridCompression`, without masks on channels: only weights become low-rank, and the
    number of channels stays. For ``cost="params"`` the module needs no ``example_input_array``.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can be split: linear
            layers and convolutions without groups.
        budget: The share of the whole network's cost that may be left, between 0 and 1.
        cost: ``"params"``, or ``"flops"`` of a forward pass of the ``example_input_array``.
        schedule: Progress of the choice, from 0 to 1, as a function of training progress
            (`lightning_plugins.schedules`). By default a straight line from ``begin`` to ``end``.
        begin: When thresholds begin to act, in ``unit``.
        end: When the choice is made, in ``unit``.
        unit: ``"fraction"`` of training, ``"steps"`` of the optimizer, or ``"epochs"``.
        threshold_learning_rate: Step size of the thresholds, which are shares of a layer's largest singular value.
        keep: Layers that stay as they are, in the form of ``layers``.
        min_rank: Minimum rank of a layer.
        multiple_of: Ranks are multiples of this, for speed.
        refresh_every: Steps between two decompositions of the weights. 1 gives the exact gradient in every step, 4 on
            average, at half of the cost.
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

    def __init__(
        self,
        layers: str | list[str],
        budget: float = 0.4,
        cost: Literal["params", "flops"] = "flops",
        *,
        schedule: Schedule | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        unit: Literal["steps", "epochs", "fraction"] = "fraction",
        threshold_learning_rate: float = 0.001,
        keep: str | list[str] | None = None,
        min_rank: int = 1,
        multiple_of: int = 1,
        refresh_every: int = 1,
        figures: bool = True,
    ) -> None:
        super().__init__(
            CompressionSettings(
                layers=layers,
                budget=budget,
                cost=cost,
                schedule=schedule,
                begin=begin,
                end=end,
                unit=unit,
                keep=keep,
                min_channels=min_rank,
                multiple_of=multiple_of,
                figures=figures,
                ranks=True,
                threshold_learning_rate=threshold_learning_rate,
                refresh_every=refresh_every,
            )
        )
