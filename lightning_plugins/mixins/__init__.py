"""LightningModule mixins for people who write their own steps."""

from lightning_plugins.mixins.von_neumann import VNEMixin

__all__ = ["VNEMixin"]
