"""Joint selection of channels and ranks under one strict budget, ending in a physically smaller network."""

from typing import Literal

from lightning_plugins._grouping import Group, grouped
from lightning_plugins.callbacks._compression.scheduled_compression import ScheduledCompression
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._trainer.phases import Phase
from lightning_plugins.compression.budget.filling import ChoiceRates, Limits


class HybridCompression(ScheduledCompression):
    """Learn which channels and which ranks a network needs within a budget, and reduce it to them, in one training.

    1. Up to ``phase.begin`` the network trains as it is.
    2. From there to ``phase.end`` masks on channels, ``sigmoid(beta * a)`` with learned scores ``a``, and thresholds on
       the singular values of weights, learned as well, act on the weights, while ``beta`` rises from 1 to ``beta_max``.
       After each of their steps all scores are lowered and all thresholds raised until the cost is that of the
       schedule. Scores begin at the norms of their channels' weights. Scores and thresholds have their own optimizer
       (Adam without weight decay); the user's optimizer, its groups, schedulers and clipping never see them.
    3. At ``phase.end`` the masks become zeros and ones, and the least useful channels and singular values are removed
       until the cost is within the budget.
    4. At the first start of an epoch from ``phase.end`` on, or else at the end of training, the channels are removed
       and the layers of low rank are factorised in place: ``net.fc`` becomes ``net.fc.0`` and ``net.fc.1``. The state
       of the optimizers is sliced and projected accordingly, and schedulers and DDP go on.
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
        phase: When masks and thresholds act (``begin``) and when the choice is made (``end``), in ``unit``. Its
            ``schedule`` is the progress ``t`` of the choice, from 0 to 1: ``beta`` is ``beta_max ** t``, and
            ``(1 - t) ** 3`` of the reduction is still to come. By default a straight line from ``begin`` to ``end``, so
            that ``beta`` grows exponentially and the cost falls fast at first.
        limits: Layers to keep as they are (``keep``), and possible numbers of channels and ranks (``min_size``,
            ``multiple_of``); a `lightning_plugins.compression.Limits`.
        rates: Step sizes of ``scores`` and ``thresholds``, ``beta_max``, and ``refresh_every``, the steps between two
            decompositions of the weights; a `lightning_plugins.compression.ChoiceRates`.
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
        >>> callback = HybridCompression(layers="*", budget=0.4, cost="flops", limits=Limits(keep="head"))
        >>> callback.finished
        False

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2309.13077. Phases, optimizer and surgery are ours.
    """

    @grouped(
        phase=Phase,
        limits=Group(Limits, older={"min_channels": "min_size"}),
        rates=Group(
            ChoiceRates,
            older={"learning_rate": "scores", "threshold_learning_rate": "thresholds"},
            new=("update_every",),
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
        blocks: str | list[str] | None = None,
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
                blocks=blocks,
                masks=True,
                ranks=True,
            )
        )
