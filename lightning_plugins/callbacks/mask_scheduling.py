"""Selection of channels under a strict budget by learned masks or magnitude, ending in a physically smaller network."""

from typing import Literal

from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.schedules import Schedule


class MaskScheduling(ScheduledCompression):
    """Choose which channels a network needs within a budget, and remove the others, in one training.

    The phases are those of `HybridCompression`, without thresholds on singular values.

    With ``criterion="magnitude"`` nothing is learned besides the weights: every ``update_every`` steps the channels
    with the largest weights that fit into the scheduled share of the cost are kept, and the others are masked. A masked
    channel keeps its weights, which only weight decay changes, and is unmasked if they are among the largest at a later
    update.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can lose channels.
        budget: The share of the whole network's cost that may be left, between 0 and 1.
        cost: ``"params"``, or ``"flops"`` of a forward pass of the ``example_input_array``.
        criterion: ``"learned"``: masks ``sigmoid(beta * a)``. ``"magnitude"``: norms of the weights that compute a
            channel, in units of the group's mean.
        schedule: Progress of the choice, from 0 to 1, as a function of training progress
            (`lightning_plugins.schedules`). By default from ``begin`` to ``end`` a straight line for learned masks,
            whose ``beta`` then grows exponentially, and a cubic for magnitudes.
        begin: When masks begin to act, in ``unit``.
        end: When the choice is made, in ``unit``.
        unit: ``"fraction"`` of training, ``"steps"`` of the optimizer, or ``"epochs"``.
        learning_rate: Step size of the mask scores, divided by ``beta`` so that a mask's logit moves by
            ``learning_rate`` in a typical step.
        beta_max: The inverse temperature at ``end``.
        update_every: Steps between two choices by magnitude.
        keep: Layers that stay as they are, in the form of ``layers``.
        min_channels: Minimum number of units to keep in a channel group.
        multiple_of: Numbers of channels are multiples of this, for speed; heads are not rounded.
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

    def __init__(
        self,
        layers: str | list[str],
        budget: float = 0.4,
        cost: Literal["params", "flops"] = "flops",
        *,
        criterion: Literal["learned", "magnitude"] = "learned",
        schedule: Schedule | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        unit: Literal["steps", "epochs", "fraction"] = "fraction",
        learning_rate: float = 0.05,
        beta_max: float = 100.0,
        update_every: int = 10,
        keep: str | list[str] | None = None,
        min_channels: int = 1,
        multiple_of: int = 1,
        figures: bool = True,
        blocks: str | list[str] | None = None,
    ) -> None:
        super().__init__(
            CompressionSettings(
                layers=layers,
                budget=budget,
                cost=cost,
                criterion=criterion,
                schedule=schedule,
                begin=begin,
                end=end,
                unit=unit,
                keep=keep,
                min_channels=min_channels,
                multiple_of=multiple_of,
                figures=figures,
                blocks=blocks,
                masks=True,
                learning_rate=learning_rate,
                beta_max=beta_max,
                update_every=update_every,
            )
        )
