"""The Lightning package of this process: `lightning.pytorch` or `pytorch_lightning`.

Both packages contain the same code with unrelated classes: a callback of one is not recognised by a Trainer of the
other. This module selects one when it is imported, and all other modules take Lightning's names from here. The package
already imported in the process is used; `lightning` if both or neither have been. Objects of the other package are
rejected with an error.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        callbacks,
        seed_everything,
    )
    from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    PACKAGE: str


_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _chosen() -> str:
    for name in _NAMES:
        if name in sys.modules:
            return name
    for name in _NAMES:  # a folder named `lightning` is a namespace package without these names
        if find_spec(name.partition(".")[0]) is not None and find_spec(name) is not None:
            return name
    raise ImportError(
        "lightning-plugins needs Lightning; run `pip install lightning` or `pip install pytorch-lightning`"
    )


_FROM = {
    "": ("Callback", "LightningDataModule", "LightningModule", "Trainer", "callbacks", "seed_everything"),
    ".loggers": ("CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
    ".plugins.precision": ("MixedPrecision",),
    ".strategies": ("DDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"),
    ".trainer.states": ("TrainerFn",),
    ".utilities.exceptions": ("MisconfigurationException",),
    ".utilities.model_helpers": ("is_overridden",),
    ".utilities.rank_zero": ("rank_zero_info", "rank_zero_warn"),
    ".utilities.seed": ("isolate_rng",),
    ".utilities.signature_utils": ("is_param_in_hook_signature",),
}


def other_package(kind: type) -> str | None:
    """Find out whether a class derives from a LightningModule or Trainer of the package that is not used.

    Args:
        kind: A class.

    Returns:
        The name of that package, such as ``"pytorch_lightning"``; None for any other class.
    """
    for base in kind.__mro__:
        if base.__name__ in {"LightningModule", "Trainer"} and base not in {LightningModule, Trainer}:
            for name in _NAMES:
                if name != PACKAGE and base.__module__.startswith(f"{name}."):
                    return name
    return None


def advice() -> str:
    """Advice for classes of both packages in one process; follows a semicolon."""
    other = next(name for name in _NAMES if name != PACKAGE)
    return (
        f"this process uses `{PACKAGE}`: change the imports to `import {PACKAGE} as pl`, for the module, the Trainer"
        f" and its callbacks alike, or import `{other}` alone, before `lightning_plugins`"
    )


if not TYPE_CHECKING:
    PACKAGE = _chosen()
    for _module, _names in _FROM.items():
        _source = import_module(PACKAGE + _module)
        globals().update({_name: getattr(_source, _name) for _name in _names})
    MultiProcessingLauncher = import_module(f"{PACKAGE}.strategies.launchers")._MultiProcessingLauncher
    _fabric = "lightning.fabric" if PACKAGE == "lightning.pytorch" else "lightning_fabric"
    move_data_to_device = import_module(f"{_fabric}.utilities").move_data_to_device

__all__ = [
    "PACKAGE",
    "Callback",
    "CometLogger",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "LightningDataModule",
    "LightningModule",
    "MLFlowLogger",
    "MisconfigurationException",
    "MixedPrecision",
    "ModelParallelStrategy",
    "MultiProcessingLauncher",
    "SingleDeviceStrategy",
    "TensorBoardLogger",
    "Trainer",
    "TrainerFn",
    "WandbLogger",
    "advice",
    "callbacks",
    "is_overridden",
    "is_param_in_hook_signature",
    "isolate_rng",
    "move_data_to_device",
    "other_package",
    "rank_zero_info",
    "rank_zero_warn",
    "seed_everything",
]
