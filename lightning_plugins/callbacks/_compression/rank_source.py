"""Source of the ranks of a compression: the user, or a search during training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_positive_int,
    plain_number,
)
from lightning_plugins._lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_plugins.callbacks._compression.costs import costs_of, example_inputs
from lightning_plugins.callbacks._compression.rank_search import (
    Score,
    check_search_options,
    load_batches,
    score_function,
    search_data,
    search_ranks,
    try_score,
    unnoticed,
)
from lightning_plugins.callbacks._compression.settings import SearchSettings, calibration_options
from lightning_plugins.compression.calibration.calibration import Calibration
from lightning_plugins.compression.costs.coverage import untouched
from lightning_plugins.compression.costs.layer_costs import COSTS, Cost
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.rank_search.problem import state_problem
from lightning_plugins.weights import Scheme


@dataclass(frozen=True, kw_only=True)
class RankSource:
    """The ranks of layers, or all that a search for them needs; the arguments are those of `LowRankCompression`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    layers: Sequence[str]
    budget: float
    search: SearchSettings
    ranks: dict[str, int] | None
    cost: Cost
    scheme: Scheme

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        check_choice("cost", self.cost, COSTS)
        object.__setattr__(self, "budget", plain_number(self.budget))

    @property
    def scores(self) -> bool:
        """True if there is a search that looks at data."""
        return self.ranks is None and self.search.method == "beam"

    @property
    def needs_data(self) -> bool:
        """True if there is a search or a calibration that looks at data."""
        return self.scores or self.search.calibration is not False

    def require(self, name: str, pl_module: LightningModule) -> None:
        """Check the module's methods; for ``setup``.

        Raises:
            MisconfigurationException: If there is nothing to score, or to count operations with.
        """
        if self.needs_data:
            score_function(pl_module, self.search.score)
        if self.cost == "flops" and pl_module.example_input_array is None:
            raise MisconfigurationException(
                f"{name}: `cost='flops'` counts a forward pass of the module's `example_input_array`, and "
                f"{type(pl_module).__name__} has none; set it in the module, or pass `cost='params'`"
            )

    def check_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are layers, and that they can be made so small; for ``on_fit_start``.

        Raises:
            ValueError: If not.
        """
        if self.ranks is None:
            inputs = example_inputs(trainer, pl_module) if self.cost == "flops" else None
            with trainer.precision_plugin.forward_context():
                state_problem(pl_module, self.budget, self.layers, self.cost, inputs, self.scheme)
            return
        allowed = select_layers(pl_module, self.layers, scheme=self.scheme, transposed=True)
        costs = costs_of(trainer, pl_module, list(self.ranks), "params", self.scheme)
        for name, cost in costs.items():
            if name not in allowed:
                raise ValueError(f"`ranks` must be of layers that `layers={list(self.layers)}` matches, got {name!r}")
            if self.ranks[name] > cost.full_rank:
                raise ValueError(f"`ranks[{name!r}]` must be at most {cost.full_rank}, got {self.ranks[name]}")
        if all(self.ranks[name] > cost.break_even for name, cost in costs.items()):
            limits = {name: cost.break_even for name, cost in costs.items()}
            raise ValueError(f"`ranks` must make at least one layer smaller, as at most {limits} do, got {self.ranks}")

    def warn_of_untouched(self, name: str, pl_module: LightningModule) -> None:
        """Say which of the layers that are asked for cannot be split; for ``on_fit_start``.

        Args:
            name: Of the callback.
            pl_module: The module.
        """
        taken = list(self.ranks or select_layers(pl_module, self.layers, scheme=self.scheme))
        left = untouched(pl_module, self.layers, taken)
        if left and self.ranks is None:
            rank_zero_warn(f"{name}: of what `layers` matches, {left}; `budget={self.budget}` is of the others' cost")

    def check_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to search with, and score a batch of it; for ``on_train_start``.

        Raises:
            MisconfigurationException: If there is none, or it cannot be scored.
        """
        if self.needs_data:
            source = search_data(trainer, pl_module, self.search.data)
            if self.scores:
                try_score(trainer, pl_module, load_batches(trainer, pl_module, source, 1)[0], self.search.score)

    def find(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
        """The ranks by layer name; all processes call."""
        return self._search(trainer, pl_module) if self.ranks is None else dict(self.ranks)

    def smaller(self, trainer: Trainer, pl_module: LightningModule, found: dict[str, int]) -> dict[str, int]:
        """The ranks of the layers that are split: with them there are fewer weights."""
        costs = costs_of(trainer, pl_module, list(found), "params", self.scheme)
        return {name: rank for name, rank in found.items() if rank <= costs[name].break_even}

    def calibrated(self, trainer: Trainer, pl_module: LightningModule) -> Calibration | None:
        """Return the calibration of the layers at this moment, None if none is asked for; all processes call."""
        if self.search.calibration is False:
            return None
        batches, score = self._data(trainer, pl_module)
        names = list(self.layers if self.ranks is None else self.ranks)
        with unnoticed(trainer, pl_module):
            return Calibration(pl_module, names, **calibration_options(self.search.calibration)).record(
                batches, forward=score
            )

    def _data(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Any], Score]:
        search = self.search
        source = search_data(trainer, pl_module, search.data)
        return load_batches(trainer, pl_module, source, search.batches), score_function(pl_module, search.score)

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
        options = {"budget": self.budget, "layers": self.layers, "cost": self.cost, "scheme": self.scheme}
        if self.cost == "flops":
            options["inputs"] = example_inputs(trainer, pl_module)
        batches: list[Any] = []
        score: Any = None
        if self.scores:
            batches, score = self._data(trainer, pl_module)
        if self.search.calibration is not False and self.search.method != "equal_ratio":
            options["calibration"] = self.calibrated(trainer, pl_module)
        return search_ranks(
            trainer,
            pl_module,
            self.search.method,
            batches,
            score,
            **options,
            **check_search_options(self.search.method, self.search.options),
        ).ranks


def _check_budget(budget: float) -> None:
    if not 0 < check_finite_number("budget", budget) < 1:
        hint = f"; did you mean {budget / 100!r}?" if 2 <= budget <= 100 else ""
        raise ValueError(f"`budget`, the share left, must be more than 0 and less than 1, got {budget!r}{hint}")


def _checked_ranks(ranks: dict[str, int] | None) -> dict[str, int] | None:
    if ranks is None:
        return None
    if not isinstance(ranks, dict) or not ranks or not all(isinstance(name, str) for name in ranks):
        raise TypeError(f"`ranks` must be a dict of layer names and ranks, with one at least, got {ranks!r}")
    return {name: check_positive_int(f"ranks[{name!r}]", rank) for name, rank in ranks.items()}
