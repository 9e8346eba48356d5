"""Selection of channels under a strict budget by learned masks or magnitude, ending in a physically smaller network."""

from typing import Literal

from lightning_plugins._grouping import Group, grouped
from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._trainer.phases import Phase
from lightning_plugins.compression.budget.filling import ChoiceRates, Limits


class MaskScheduling(ScheduledCompression):
    """Choose which channels a network needs within a budget, and remove the others, in one training.

    The phases are those of `HybridCompression`, without thresholds on singular values.

    With ``criterion="magnitude"`` nothing is learned besides the weights: every ``rates.update_every`` steps the
    channels with the largest weights that fit into the scheduled share of the cost are kept, and the others are masked.
    A masked channel keeps its weights, which only weight decay changes, and is unmasked if they are among the largest
    at a later update.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can lose channels.
        budget: The share of the whole network's cost that may be left, between 0 and 1.
        cost: ``"params"``, or ``"flops"`` of a forward pass of the ``example_input_array``.
        criterion: ``"learned"``: masks ``sigmoid(beta * a)``. ``"magnitude"``: norms of the weights that compute a
            channel, in units of the group's mean.
        phase: When masks act (``begin``) and when the choice is made (``end``), in ``unit``. Its ``schedule``, the
            progress of the choice, is by default a straight line from ``begin`` to ``end`` for learned masks, whose
            ``beta`` then grows exponentially, and a cubic for magnitudes.
        limits: Layers to keep as they are (``keep``), and possible numbers of channels (``min_size``,
            ``multiple_of``); a `lightning_plugins.compression.Limits`.
        rates: Step size of learned ``scores``, ``beta_max``, and ``update_every``, the steps between two choices by
            magnitude; a `lightning_plugins.compression.ChoiceRates`. Its other fields are those of thresholds.
        figures: Whether to draw masks, cost and the network that is left, if matplotlib is installed.
        blocks: Residual blocks that may be removed as a whole, in the form of ``layers``: modules that return the shape
            of their input, as ``"encoder.layer.*"``. A removed block becomes a
            `lightning_plugins.compression.Skipped`. With blocks ``layers`` may be an empty list: nothing else is
            chosen.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Attributes:
        report: As that of `HybridCompression`.

    Logs at every step ``budget/<cost>`` and ``mask/<group of channels>/kept``.

    Example:
        >>> callback = MaskScheduling(layers="backbone.*", budget=0.5, cost="params", criterion="magnitude")
        >>> callback.finished
        False

    Source:
        Our reading of DML-S of Eo et al., https://arxiv.org/abs/2309.13077; for the cubic schedule of magnitudes
        Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878.
    """

    @grouped(
        phase=Phase,
        limits=Group(Limits, older={"min_channels": "min_size"}),
        rates=Group(ChoiceRates, older={"learning_rate": "scores"}, new=("thresholds", "refresh_every")),
    )
    def __init__(
        self,
        layers: str | list[str],
        budget: float = 0.4,
        cost: Literal["params", "flops"] = "flops",
        *,
        criterion: Literal["learned", "magnitude"] = "learned",
        phase: Phase = Phase(),
        limits: Limits = Limits(),
        rates: ChoiceRates = ChoiceRates(),
        figures: bool = True,
        blocks: str | list[str] | None = None,
    ) -> None:
        super().__init__(
            CompressionSettings(
                layers=layers,
                budget=budget,
                cost=cost,
                criterion=criterion,
                phase=phase,
                limits=limits,
                rates=rates,
                figures=figures,
                blocks=blocks,
                masks=True,
            )
        )
