"""Meta-learning with geometry-adaptive preconditioned inner steps for LightningModules."""

from typing import Any

import torch
from torch import Tensor

from lightning_plugins.meta import GAP, ApproximateGAP, Episodes, Preconditioner
from lightning_plugins.mixins.maml import MAMLMixin


class GAPMixin(MAMLMixin):
    """Gives a LightningModule the steps of meta-learning with learned gains of the inner gradients' singular values.

    Like `MAMLMixin`, but the default ``preconditioner`` is `lightning_plugins.meta.GAP`; another instance, or a
    `lightning_plugins.meta.ApproximateGAP`, can be passed. A network of linear layers needs ``GAP(linear=True)``. The
    gains have the learning rate ``preconditioner_learning_rate``, are saved in checkpoints, and start where GAP is
    MAML.

    Published settings, all with five inner steps of rate 0.01 in training and ten in evaluation: mini-ImageNet, 1 shot,
    ``learning_rate=1e-4`` and ``preconditioner_learning_rate=3e-3`` with 4 tasks per batch; 5 shots, 1e-4 for both with
    2 tasks; 80,000 batches each.

    Logs ``gap/<layer>/gain_min`` and ``gap/<layer>/gain_max`` in training: the smallest and largest gain of every layer
    that has gains, whenever the Trainer logs.

    Example:
        >>> from lightning_plugins._lightning import LightningModule
        >>> from torch import nn
        >>> class FewShot(GAPMixin, LightningModule):
        ...     def __init__(self):
        ...         network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        ...         super().__init__(network, nn.functional.cross_entropy, preconditioner_learning_rate=3e-3)
        >>> [(group["name"], group["lr"]) for group in FewShot().parameter_groups()]
        [('weights', 0.001), ('preconditioner', 0.003)]

    Source:
        Kang et al., CVPR 2023, https://arxiv.org/abs/2304.01552. Unlike in the authors' training script, the second
        learning rate is used.
    """

    def gains(self) -> dict[str, Tensor]:
        """Return the current gains.

        Returns:
            By layer, a tensor ``(r,)`` with the gain of the largest singular value first, or ``(steps, r)`` with
            separate gains per step; detached.

        Raises:
            TypeError: If the preconditioner was replaced by one without gains.
        """
        gap = self.inner_loop.preconditioner
        if not isinstance(gap, GAP | ApproximateGAP):  # checked in the constructor, but may have been replaced
            raise TypeError(f"`inner_loop.preconditioner` must be GAP or ApproximateGAP, got {type(gap).__name__}")
        with torch.no_grad():
            if not gap.per_step:
                return {_layer(name): gains for name, gains in gap.gains().items()}
            steps = [gap.gains(step) for step in range(self.inner_loop.steps)]
            return {_layer(name): torch.stack([gains[name] for gains in steps]) for name in steps[0]}

    def _preconditioner(self, given: Preconditioner | None) -> Preconditioner:
        if given is None:
            return GAP()
        if not isinstance(given, GAP | ApproximateGAP):
            got = given.__name__ if isinstance(given, type) else type(given).__name__
            raise TypeError(
                f"`preconditioner` must be a GAP or ApproximateGAP, such as `GAP(linear=True)`, got {got}; MAMLMixin"
                " takes any `Preconditioner`"
            )
        return given

    def _episodes(self, batch: Any) -> tuple[Episodes, Tensor | None]:
        measured = super()._episodes(batch)
        if self._trainer is not None and self.trainer.training and self._trainer_logs():
            for layer, gains in self.gains().items():
                self.log(f"gap/{layer}/gain_min", gains.min())
                self.log(f"gap/{layer}/gain_max", gains.max())
        return measured

    def _trainer_logs(self) -> bool:
        """Tell whether values logged at this step reach a logger; at the first step they also reach callbacks."""
        step, every = self.trainer.global_step, getattr(self.trainer, "log_every_n_steps", 0)
        return step == 0 or (bool(every) and (step + 1) % every == 0)


def _layer(name: str) -> str:
    """The layer of a weight, with the part of a packed attention weight."""
    weight, colon, part = name.partition(":")
    return (weight.removesuffix("weight").rstrip("._") or "network") + colon + part
