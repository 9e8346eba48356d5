"""The compressions under a budget that keep the contract, one row each, with what a user would write instead.

They stand beside `tests.contract_table`, and not in it: there the same training is written out by hand and the
architecture stays, while here it ends in another network, and what is promised are its size, and that one training
equals another. The tests named ``test_contract_compression*`` run over all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_plugins._lightning import Callback  # the contract runs with both packages
from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from tests.callbacks.budgets import in_steps

GROUPS = ("backbone.0", "backbone.2", "backbone.4")
LAYERS = (*GROUPS, "head")
KEPT = tuple(f"mask/{group}/kept" for group in GROUPS)
RANKS = tuple(f"rank/{layer}" for layer in LAYERS)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        make: Makes the callback; called once for every Trainer, with settings of its own at times.
        logged: The names it logs, all of them.
        yaml: The same callback as LightningCLI reads it, with all its arguments.
        budget: The share of the parameters that may be left.
        tolerance: How near two trainings come that differ in rounding errors.
    """

    make: Callable[..., Any]
    logged: tuple[str, ...]
    yaml: str
    budget: float = 0.5
    tolerance: dict[str, float] = field(default_factory=lambda: {"rtol": 1e-9, "atol": 1e-11})

    def callback(self, **settings: Any) -> Any:
        """The callback, choosing between the steps 3 and 11 of epochs of six."""
        return self.make(**{"budget": self.budget, "end": 11, **settings})

    @property
    def learned(self) -> bool:
        """True if gradients choose."""
        callback: Callback = self.callback()
        return bool(vars(callback)["settings"].learned)


def hybrid(**settings: Any) -> Any:
    return in_steps(HybridCompression, **settings)


def masks(**settings: Any) -> Any:
    return in_steps(MaskScheduling, **settings)


def magnitudes(**settings: Any) -> Any:
    return in_steps(MaskScheduling, criterion="magnitude", **{"update_every": 3, **settings})


def ranks(**settings: Any) -> Any:
    return in_steps(RankScheduling, **settings)


COMPRESSIONS = {
    "hybrid": Row(
        hybrid,
        ("budget/params", *KEPT, *RANKS),
        """
class_path: lightning_plugins.callbacks.HybridCompression
init_args:
  layers: "*"
  budget: 0.5
  cost: params
  phase:
    begin: 3
    end: 11
    unit: steps
    schedule:
      class_path: lightning_plugins.schedules.Linear
      init_args: {start: 0.0, end: 1.0, begin: 3, until: 11, unit: steps}
  limits: {keep: null, min_size: 1, multiple_of: 1}
  rates: {scores: 0.2, thresholds: 0.03, beta_max: 100.0, refresh_every: 1}
  figures: false
  blocks: null
""",
        # Where masks close channels, singular values come near to zero, of which a Gram matrix keeps half of the
        # digits: weights that differ by 1e-15 at the beginning differ by up to 9e-7 in the end.
        tolerance={"rtol": 1e-5, "atol": 5e-6},
    ),
    "masks": Row(
        masks,
        ("budget/params", *KEPT),
        """
class_path: lightning_plugins.callbacks.MaskScheduling
init_args:
  layers: [backbone.0, backbone.2, "backbone.4"]
  budget: 0.5
  cost: params
  criterion: learned
  phase: {begin: 3, end: 11, unit: steps, schedule: null}
  limits: {keep: head, min_size: 1, multiple_of: 1}
  rates: {scores: 0.2, beta_max: 100.0, update_every: 10}
  figures: false
  blocks: null
""",
    ),
    "magnitude": Row(
        magnitudes,
        ("budget/params", *KEPT),
        """
class_path: lightning_plugins.callbacks.MaskScheduling
init_args: {layers: "*", budget: 0.5, cost: params, criterion: magnitude, rates: {update_every: 3},
  phase: {begin: 3, end: 11, unit: steps}, figures: false}
""",
    ),
    "ranks": Row(
        ranks,
        ("budget/params", *RANKS),
        """
class_path: lightning_plugins.callbacks.RankScheduling
init_args:
  layers: "*"
  budget: 0.6
  cost: params
  phase: {begin: 3, end: 11, unit: steps, schedule: null}
  limits: {keep: null, min_size: 1, multiple_of: 1}
  rates: {thresholds: 0.03, refresh_every: 1}
  figures: false
""",
        budget=0.6,
    ),
}
