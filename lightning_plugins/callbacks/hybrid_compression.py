"""Joint selection of channels and ranks under one strict budget, ending in a physically smaller network."""

from typing import Literal

from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.schedules import Schedule


class HybridCompression(ScheduledCompression):
    """Learn which channels and which ranks a network needs within a budget, and reduce it to them, in one training.

    1. Up to ``begin`` the network trains as it is.
    2. From there to ``end`` masks on channels, ``sigmoid(beta * a)`` with learned scores ``a``, and thresholds on the
       singular values of weights, learned as well, act on the weights, while ``beta`` rises from 1 to ``beta_max``.
       After each of their steps all scores are lowered and all thresholds raised until the cost is that of the
       schedule. Scores begin at the norms of their channels' weights. Scores and thresholds have their own optimizer
       (Adam without weight decay); the user's optimizer, its groups, schedulers and clipping never see them.
    3. At ``end`` the masks become zeros and ones, and the least useful channels and singular values are removed until
       the cost is within the budget.
    4. At the first start of an epoch from ``end`` on, or else at the end of training, the channels are removed and the
       layers of low rank are factorised in place: ``net.fc`` becomes ``net.fc.0`` and ``net.fc.1``. The state of the
       optimizers is sliced and projected accordingly, and schedulers and DDP go on.
    5. The rest of training fine-tunes the small network.

    The final network is always within the budget; if even the smallest one would not be, the training does not begin.
    Its checkpoints are loaded by every Trainer that has this callback, or whose module has
    `lightning_plugins.mixins.CompressionMixin`, which `load_from_checkpoint` needs too; anywhere else
    `lightning_plugins.compression.restore_structure` gives a fresh module the structure first. Checkpoints from before
    are those of the dense module and load everywhere; the scores stand in the callback's part.

    The module needs an ``example_input_array``, used to trace channel dependencies and to count FLOPs; torch-pruning
    must be installed.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can be compressed.
        budget: The share of the whole network's cost that may be left, between 0 and 1.
        cost: ``"params"``, or ``"flops"`` of a forward pass of the ``example_input_array``.
        schedule: Progress ``t`` of the choice, from 0 to 1, as a function of training progress
            (`lightning_plugins.schedules`): ``beta`` is ``beta_max ** t``, and ``(1 - t) ** 3`` of the reduction is
            still to come. By default a straight line from ``begin`` to ``end``, so that ``beta`` grows exponentially
            and the cost falls fast at first.
        begin: When masks and thresholds begin to act, in ``unit``.
        end: When the choice is made, in ``unit``.
        unit: ``"fraction"`` of training, ``"steps"`` of the optimizer, or ``"epochs"``.
        learning_rate: Step size of the mask scores, divided by ``beta`` so that a mask's logit moves by
            ``learning_rate`` in a typical step.
        threshold_learning_rate: Step size of the thresholds, which are shares of a layer's largest singular value.
        beta_max: The inverse temperature at ``end``.
        keep: Layers that stay as they are, in the form of ``layers``.
        min_channels: Minimum number of units to keep in a channel group, and minimum rank.
        multiple_of: Numbers of channels and ranks are multiples of this, for speed; heads are not rounded.
        refresh_every: Steps between two decompositions of the weights. 1 gives the exact gradient in every step, 4 on
            average, at half of the cost.
        figures: Whether to draw masks, ranks, cost and the network that is left, if matplotlib is installed.
        blocks: Residual blocks that may be removed as a whole, in the form of ``layers``: modules that return the shape
            of their input, as ``"encoder.layer.*"``. A removed block becomes a
            `lightning_plugins.compression.Skipped`. With blocks ``layers`` may be an empty list: nothing else is
            chosen.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Attributes:
        report: Once the network is small, a `lightning_plugins.compression.CompressionReport`: parameters and, where
            the module has an ``example_input_array``, operations, before and after, per layer and in all; the units
            that were ``kept`` and the ``ranks`` by layer; and the ``share`` of the cost that is left.

    Logs at every step ``budget/<cost>``, the share of the cost that masks and ranks leave,
    ``mask/<group of channels>/kept`` and ``rank/<layer>``.

    Example:
        >>> callback = HybridCompression(layers="*", budget=0.4, cost="flops", keep="head")
        >>> callback.finished
        False

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2309.13077. Phases, optimizer and surgery are ours.
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
        learning_rate: float = 0.05,
        threshold_learning_rate: float = 0.001,
        beta_max: float = 100.0,
        keep: str | list[str] | None = None,
        min_channels: int = 1,
        multiple_of: int = 1,
        refresh_every: int = 1,
        figures: bool = True,
        blocks: str | list[str] | None = None,
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
                min_channels=min_channels,
                multiple_of=multiple_of,
                figures=figures,
                blocks=blocks,
                masks=True,
                ranks=True,
                learning_rate=learning_rate,
                threshold_learning_rate=threshold_learning_rate,
                beta_max=beta_max,
                refresh_every=refresh_every,
            )
        )
