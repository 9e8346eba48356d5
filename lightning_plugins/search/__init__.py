"""Hyperparameter search with few trials: a sampler and a pruner for Optuna, and training runs as trials.

All but `TercetRule` and `Workers` need the extra ``search``; they are imported on demand.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_plugins.search.tercet import TercetRule

if TYPE_CHECKING:
    from lightning_plugins.search.pruner import TercetPruner
    from lightning_plugins.search.sampler import B2EASampler, origins
    from lightning_plugins.search.shared_trial import SharedTrial, shared_trials
    from lightning_plugins.search.tuning import TuneResult, tune
    from lightning_plugins.search.workers import Workers

__all__ = [
    "B2EASampler",
    "SharedTrial",
    "TercetPruner",
    "TercetRule",
    "TuneResult",
    "Workers",
    "origins",
    "shared_trials",
    "tune",
]

_MODULES = {
    "B2EASampler": "sampler",
    "origins": "sampler",
    "TercetPruner": "pruner",
    "SharedTrial": "shared_trial",
    "shared_trials": "shared_trial",
    "TuneResult": "tuning",
    "tune": "tuning",
    "Workers": "workers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
