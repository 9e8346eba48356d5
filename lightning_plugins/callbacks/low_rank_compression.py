"""A smaller network from one training: search of ranks, regularisation, factors for weights, fine-tuning."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_plugins._checks import check_instance, plain_number
from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import LightningModule, Trainer
from lightning_plugins.callbacks._compression.compressing_callback import CompressingCallback
from lightning_plugins.callbacks._compression.costs import network_costs
from lightning_plugins.callbacks._compression.rank_source import RankSource
from lightning_plugins.callbacks._compression.settings import (
    Penalty,
    Search,
    SearchSettings,
    Timing,
    as_penalty,
    as_search,
)
from lightning_plugins.callbacks._monitors.figures import check_figures, hand_to_loggers
from lightning_plugins.callbacks._surgery.averages import put_averages_in_place
from lightning_plugins.callbacks._surgery.mirrors import warn_of_mirrors
from lightning_plugins.callbacks._surgery.sharding import require_sharding, whole_network
from lightning_plugins.callbacks._surgery.swap import look_at_whole, operate, require_operable
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._trainer.phases import reached, require_end
from lightning_plugins.callbacks.stable_rank import StableRankRegularization
from lightning_plugins.compression.budget.carried_state import split_layers
from lightning_plugins.compression.costs.network_costs import NetworkCosts
from lightning_plugins.compression.networks.replacements import Replacements
from lightning_plugins.compression.rank_search.problem import removed_for
from lightning_plugins.compression.reports.report import CompressionReport
from lightning_plugins.plots import compression_figure
from lightning_plugins.plots.style import has_matplotlib
from lightning_plugins.selection import check_layers
from lightning_plugins.weights import check_scheme


class LowRankCompression(CompressingCallback):
    """Train a network to a wanted size within one ``trainer.fit``: its weights become products of two smaller ones.

    1. Up to ``timing.search_at`` the network trains as it is.
    2. There a search finds a rank for each layer such that at most ``budget`` of the layers' cost is left.
    3. From then on the modified stable rank drives the weights to these ranks (see `StableRankRegularization`).
    4. At the first start of an epoch from ``timing.factorize_at`` on, or else at the end of training, each layer is
       factorised in place: ``net.fc`` becomes ``net.fc.0`` and ``net.fc.1``. The state of the optimizers is carried
       over to the factors, and schedulers and DDP continue.
    5. The rest of training fine-tunes the small network.

    Afterwards the module is the small network. Its checkpoints are loaded by every Trainer that has this callback, or
    whose module has `lightning_plugins.mixins.CompressionMixin`, which `load_from_checkpoint` needs too; anywhere else
    `lightning_plugins.compression.restore_structure` gives a fresh module the structure first.

    Each phase can be left out: ``ranks`` replaces the search, ``penalty=0`` omits the regularisation,
    ``timing=Timing(factorize_at=None)`` the factors and the fine-tuning. Later trainings of a module that this callback
    has compressed only fine-tune it.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Globs take what can be split: linear
            layers and convolutions without groups.
        budget: The share of the selected layers' cost that may be left, between 0 and 1; ignored where ``ranks`` are
            given. Up to the next minor version the older ``ratio``, ``1 - budget``, is taken too.
        search: How the ranks are searched: the name of a method, ``"beam"``, ``"equal_ratio"``, ``"energy"``,
            ``"trade_off"`` or ``"output_energy"``, or a `SearchSettings` with its options, score and data.
        ranks: Ranks by layer name, instead of a search.
        penalty: The regularisation: its weight, or a `Penalty`.
        timing: When the ranks are searched, and when the layers are split.
        cost: What ``budget`` is a share of: ``"params"``, or ``"flops"`` of the module's ``example_input_array``.
        scheme: How a convolution is split: 1 into ``k x k`` and ``1 x 1``, 2 into ``1 x k`` and ``k x 1``.
        figures: Whether to draw the report at the end of training, for the loggers or a file, if matplotlib is
            installed.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Attributes:
        found: The ranks by layer name, once they are known.
        report: After the layers were split, a `lightning_plugins.compression.CompressionReport` of the whole network:
            parameters and, where the module has an ``example_input_array``, operations, per layer and in all.

    Logs at every step ``budget/<cost>``, the current cost of the network as a fraction of the dense cost, and
    ``rank/<layer>`` once the ranks are known.

    Example:
        >>> callback = LowRankCompression(layers="backbone.*", budget=0.3, search=SearchSettings(options={"width": 2}))
        >>> callback.budget
        0.3

    Source:
        Our reading of Eo et al., Neural Networks 2023, https://arxiv.org/abs/2111.15179. When the phases begin
        and what becomes of the optimizer's state is ours.
    """

    @grouped(
        search=Group(
            SearchSettings,
            older={"search_options": "options", "search_data": "data", "search_batches": "batches"},
            main="method",
        ),
        penalty=Group(Penalty, older={"weight": "weight"}, main="weight"),
        timing=Timing,
    )
    @renamed(listed=True, positional=("ratio", "penalty"), ratio=Replaced("budget", share_left))
    def __init__(
        self,
        layers: str | list[str],
        *,
        budget: float = 0.4,
        search: Search | SearchSettings = "beam",
        ranks: dict[str, int] | None = None,
        penalty: float | Penalty = Penalty(),
        timing: Timing = Timing(),
        cost: Literal["params", "flops"] = "params",
        scheme: Literal[1, 2] = 1,
        figures: bool = True,
    ) -> None:
        super().__init__(check_layers(layers, sides=False))
        penalty = as_penalty(penalty)
        check_instance("timing", timing, Timing, "a Timing, such as Timing(search_at=0.4, factorize_at=0.8)")
        self.figures = check_figures(figures)
        self.weight = penalty.weight
        self.scheme, self.cost = check_scheme(scheme), cost
        self._settings: dict[str, Any] = {**vars(penalty), "scheme": self.scheme}
        self._source = RankSource(
            layers=self.layers,
            budget=budget,
            search=as_search(search),
            ranks=ranks,
            cost=cost,
            scheme=self.scheme,
        )
        self.budget = plain_number(budget)
        self.search_at, self.factorize_at, self.unit = timing.search_at, timing.factorize_at, timing.unit

    @property
    def ratio(self) -> float:
        """The fraction to remove, ``1 - budget``; an older name, which works up to the next minor version."""
        return removed_for(self.budget, "ratio", "budget")

    def _forget(self) -> None:
        super()._forget()
        self.found: dict[str, int] | None = None
        self._penalty: StableRankRegularization | None = None
        self._penalty_state: dict[str, Any] | None = None

    def _require(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        require_operable(name, trainer, whole=True)
        require_sharding(name, trainer, pl_module)
        require_end(name, trainer, self.unit)
        self._source.require(name, pl_module)

    def _arguments(self) -> str:
        source, phases = self._source, (self.search_at, self.factorize_at, self.unit)
        search = source.search.method, source.budget, source.cost, source.ranks, source.search.batches
        return f"{self.layers}, {search}, {phases}, {self._settings}"

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if self.factorize_at is not None:
            warn_of_mirrors(name, pl_module)
        network = whole_network(pl_module)
        self._source.warn_of_untouched(name, network)
        if self.found is not None:  # from a checkpoint
            self._regularize(trainer, pl_module)
        else:
            self._source.check_layers(trainer, network)

    def _missed(self) -> str | None:
        if self.factorize_at is None:
            return None
        return (
            f"`factorize_at={self.factorize_at}` ({self.unit}), so no layer was split; train on, or call "
            "`lightning_plugins.compression.factorize`"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check for the data of the search now, when no training is lost if there is none."""
        super().on_train_start(trainer, pl_module)
        if self.found is None and not self.finished:
            self._source.check_data(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Search if it is due; a search need not wait for the end of an epoch."""
        if batch_idx == 0:  # when resuming after an epoch's last batch, Lightning skips `on_train_epoch_start`
            self._advance(trainer, pl_module)
        elif self.found is None and not self.finished and reached(trainer, self.search_at, self.unit):
            self._find(trainer, pl_module)
        if self._norms is not None:
            self._norms.before_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the regularisation between the search and the split."""
        if self._penalty is not None:
            self._penalty.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the ranks and the cost."""
        self._rest_norms()
        share = 1.0 if self.report is None else replace(self.report, cost=self.cost).share
        if share is not None:  # as in a training resumed under another cost, which the first part did not count
            log_value(pl_module, f"budget/{self.cost}", share, prog_bar=True)
        for name, rank in (self.found or {}).items():
            log_value(pl_module, f"rank/{name}", rank)
        if self._penalty is not None:
            self._penalty.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish pending work after the last epoch, before its checkpoints are written."""
        if self._penalty is not None:
            self._penalty.on_train_epoch_end(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish pending work if the training was stopped early, and draw the report."""
        super().on_train_end(trainer, pl_module)
        if self.report is not None and self.figures and trainer.is_global_zero and has_matplotlib():
            hand_to_loggers(trainer, "compression", compression_figure(self.report, title=type(pl_module).__name__))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        super().teardown(trainer, pl_module, stage)
        if self._penalty is not None:
            self._penalty.teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the ranks found, the report, and the state of the regularisation."""
        penalty = self._penalty_state if self._penalty is None else self._penalty.state_dict()
        return {**super().state_dict(), "found": self.found, "penalty": penalty}

    def _resume(self, entry: Callable[[str], Any]) -> None:
        self.found, self._penalty_state = entry("found"), entry("penalty")

    def _advance(self, trainer: Trainer, pl_module: LightningModule, *, last: bool = False) -> None:
        """Search or split if it is due, between two epochs."""
        if self.finished:
            return
        if self.found is None and reached(trainer, self.search_at, self.unit, between_epochs=True):
            self._find(trainer, pl_module)
        at = self.factorize_at
        if at is not None and reached(trainer, at, self.unit, between_epochs=True):
            self._split(trainer, pl_module, last=last)

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found = look_at_whole(trainer, pl_module, lambda: self._source.find(trainer, pl_module))
        self._regularize(trainer, pl_module)

    def _regularize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = self._source.smaller(trainer, whole_network(pl_module), self.found or {})
        if self.weight and ranks:
            self._penalty = StableRankRegularization(list(ranks), rank=ranks, **self._settings)
            self._penalty.on_fit_start(trainer, pl_module)
            if self._penalty_state is not None:
                self._penalty.load_state_dict(self._penalty_state)

    def _split(self, trainer: Trainer, pl_module: LightningModule, *, last: bool) -> None:
        if last:
            put_averages_in_place(trainer, pl_module)
        costs: list[NetworkCosts] = []

        def split() -> Replacements:
            ranks = self._source.smaller(trainer, pl_module, self.found or {})
            costs.append(network_costs(trainer, pl_module))
            calibration = self._source.calibrated(trainer, pl_module)
            replacements = split_layers(pl_module, ranks, scheme=self.scheme, calibration=calibration)
            costs.append(network_costs(trainer, pl_module))
            return replacements

        operate(trainer, pl_module, split)
        self._penalty = self._penalty_state = None
        before, after = costs
        self._deliver(trainer, pl_module, CompressionReport(before, after), last=last)
