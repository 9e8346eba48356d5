"""Mixins for LightningModules with custom steps."""

from lightning_plugins.mixins._inner_settings import InnerSettings
from lightning_plugins.mixins.compression import CompressionMixin
from lightning_plugins.mixins.distillation import DistillationMixin
from lightning_plugins.mixins.gap import GAPMixin
from lightning_plugins.mixins.maml import MAMLMixin
from lightning_plugins.mixins.stable_rank import StableRankMixin
from lightning_plugins.mixins.von_neumann import VNEMixin

__all__ = [
    "CompressionMixin",
    "DistillationMixin",
    "GAPMixin",
    "InnerSettings",
    "MAMLMixin",
    "StableRankMixin",
    "VNEMixin",
]
