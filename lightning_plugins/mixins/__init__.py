"""Mixins for a ``LightningModule`` that writes its own training step."""
