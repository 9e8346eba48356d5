"""LightningModule mixins for people who write their own steps."""

from lightning_plugins.mixins.stable_rank import StableRankMixin
from lightning_plugins.mixins.von_neumann import VNEMixin

__all__ = ["StableRankMixin", "VNEMixin"]
