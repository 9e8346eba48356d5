"""A teacher, and the distance from it, for modules that assemble their own loss."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number, check_instance, check_text
from lightning_plugins._lightning import LightningModule
from lightning_plugins.callbacks._terms.distances import Distance
from lightning_plugins.callbacks._terms.logged import log_mean, log_sum
from lightning_plugins.callbacks._terms.teachers import check_teacher, freeze, make_teacher

_KEY = "distillation_teacher"


class DistillationMixin:
    """Gives a LightningModule a frozen teacher and ``self.distillation_penalty(student, teacher)``.

    List it before `LightningModule` among the bases. The teacher is not among the parameters; checkpoints store it next
    to the weights, and a module that calls `attach_teacher` in its constructor restores it. A module that defines
    ``on_save_checkpoint`` or ``on_load_checkpoint`` must call those of ``super()``.

    Example:
        >>> from lightning_plugins._lightning import LightningModule
        >>> class Model(DistillationMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(8, 4)
        ...         self.attach_teacher(self.net)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         logits = self.net(batch[0])
        ...         loss = torch.nn.functional.cross_entropy(logits, batch[1])
        ...         return loss + self.distillation_penalty(logits, self.teach(batch[0]), weight=0.5, temperature=2.0)
        >>> model = Model()
        >>> len(list(model.parameters())), bool(model.training_step((torch.eye(8), torch.zeros(8).long()), 0) > 0)
        (2, True)

    Source:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531.
    """

    def attach_teacher(self, teacher: str | nn.Module, network: nn.Module | None = None) -> None:
        """Use a frozen copy of a network as teacher.

        Args:
            teacher: The network; or as for `lightning_plugins.callbacks.Distillation`, with ``network``.
            network: The network that ``"start"`` copies, or that a checkpoint path belongs to.

        Raises:
            ValueError: If there is no such teacher.
            TypeError: If it is of the wrong kind.
        """
        check_teacher(teacher)
        if network is not None:
            check_instance("network", network, nn.Module, "a module")
        if not isinstance(teacher, nn.Module) and network is None:
            raise ValueError(f"`network` must be given with `teacher={teacher!r}`, got None")
        vars(self)["_teacher"] = (make_teacher(teacher, network or nn.Identity()),)  # in a tuple: not a submodule

    def teach(self, *args: Any, **kwargs: Any) -> Any:
        """Return the teacher's outputs for arguments, without gradients.

        Args:
            *args: The arguments.
            **kwargs: The arguments by name.

        Returns:
            What the network returns.

        Raises:
            RuntimeError: If `attach_teacher` was not called.
        """
        own = _teacher_of(self)
        beside: Any = next(self.parameters(), None) if isinstance(self, nn.Module) else None
        if beside is not None:
            own.to(beside.device)
        with torch.no_grad():
            return own(*args, **kwargs)

    def distillation_penalty(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: float = 1.0,
        loss: Literal["kl", "mse", "cosine"] = "kl",
        temperature: float = 1.0,
        mask: Tensor | None = None,
        layout: str | None = None,
        name: str | None = None,
    ) -> Tensor:
        """Weighted mean distance over the valid positions of all processes; a collective call.

        Args:
            student: Floating tensor of shape ``(N, C)``, ``(N, L, C)``, ``(N, C, H, W)`` or of the ``layout``.
            teacher: The corresponding tensor of the teacher.
            weight: The factor.
            loss: As for `lightning_plugins.callbacks.Distillation`.
            temperature: Softens the probabilities of ``"kl"``.
            mask: Which positions are no padding; see `lightning_plugins.functional.pool_embeddings`.
            layout: The dimensions, one letter each.
            name: If given, and a Trainer runs this module, logs ``distillation/<name>`` and ``distillation/penalty``.

        Returns:
            Scalar.

        Raises:
            ValueError: If an argument is out of its range, or the shapes differ.
            TypeError: If an argument is of the wrong type.
        """
        distance = Distance(loss, temperature, layout)
        mine, valid = distance.places("student", student, mask)
        theirs, _ = distance.places("teacher", teacher, None)
        found = distance(mine, theirs, valid)
        penalty = check_finite_number("weight", weight) * found
        if name is not None:
            check_text("name", name)
        if name is not None and isinstance(self, LightningModule) and self._trainer is not None:
            log_mean(self, f"distillation/{name}", found)
            log_sum(self, "distillation/penalty", penalty)
        return penalty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the teacher in the checkpoint.

        Args:
            checkpoint: A Lightning checkpoint.
        """
        if "_teacher" in vars(self):
            checkpoint[_KEY] = dict(_teacher_of(self).state_dict())
        parent: Any = super()  # LightningModule, or another mixin
        parent.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the teacher.

        Args:
            checkpoint: A Lightning checkpoint.
        """
        if "_teacher" in vars(self) and _KEY in checkpoint:
            freeze(_teacher_of(self)).load_state_dict(checkpoint[_KEY])
        parent: Any = super()
        parent.on_load_checkpoint(checkpoint)


def _teacher_of(module: object) -> nn.Module:
    held = vars(module).get("_teacher")
    if held is None:
        raise RuntimeError("`attach_teacher` must be called first; in the constructor, for checkpoints to find it")
    teacher: nn.Module = held[0]
    return teacher
