"""The Lightning package of this process: `lightning.pytorch` or `pytorch_lightning`.

Both hold the same code under two names, with classes that do not know each other: a callback of the one is none for a
Trainer of the other. This module decides once, when it is imported, and everything else takes Lightning's names from
here. The package that the process has imported is taken; `lightning` where both have been, or neither.
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


def _chosen() -> str:
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in names:
        if name in sys.modules:
            return name
    for name in names:
        if find_spec(name.partition(".")[0]) is not None:
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
    "callbacks",
    "is_overridden",
    "is_param_in_hook_signature",
    "isolate_rng",
    "move_data_to_device",
    "rank_zero_info",
    "rank_zero_warn",
    "seed_everything",
]
