"""Checkpoints of compressed networks that a LightningModule loads by itself."""

from typing import Any

from torch import nn

from lightning_plugins.compression.restore_structure import restore_structure


class CompressionMixin:
    """Lets a LightningModule load checkpoints in which it is smaller than its constructor makes it.

    With it ``load_from_checkpoint`` works, and so does every Trainer's ``ckpt_path``, with or without the callback that
    compressed the network: before weights are loaded, layers are split or made narrower as the checkpoint has them. It
    stands before `LightningModule` among the bases. A module with an ``on_load_checkpoint`` of its own calls
    ``super().on_load_checkpoint(checkpoint)``.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_plugins.compression import factorize
        >>> class Model(CompressionMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> checkpoint = {"state_dict": factorize(Model(), {"net.0": 2}).state_dict()}
        >>> model = Model()
        >>> model.on_load_checkpoint(checkpoint)
        >>> model.load_state_dict(checkpoint["state_dict"])
        <All keys matched successfully>
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the module the structure that the checkpoint was saved with.

        Args:
            checkpoint: A Lightning checkpoint; its weights are loaded afterwards.

        Raises:
            ValueError: If the checkpoint is not one of this module, however compressed.
            TypeError: If this class is no ``nn.Module``.
        """
        if not isinstance(self, nn.Module):
            raise TypeError(f"`CompressionMixin` must be mixed into a LightningModule, got {type(self).__name__}")
        restore_structure(self, checkpoint["state_dict"], strict=False)  # `load_state_dict` is as strict as it is told
        parent: Any = super()  # LightningModule, or another mixin
        parent.on_load_checkpoint(checkpoint)
