"""The mean distance of a student's tensors from a teacher's, over the valid positions of all processes."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._checks import check_choice, check_positive_number
from lightning_plugins.callbacks._rows.select import Select, Step, check_select
from lightning_plugins.distributed import is_distributed, world_size
from lightning_plugins.functional.distillation import cosine_error, feature_error, soft_target_divergence
from lightning_plugins.functional.pooling import check_layout, layout_axes, pool_embeddings
from lightning_plugins.functional.tensors import check_floating, check_real

LOSSES = ("kl", "mse", "cosine")
_LAYOUTS = {2: "NC", 3: "NLC", 4: "NCHW"}


@dataclass(frozen=True, kw_only=True)
class MatchedOutputs:
    """The outputs of a network that `Distillation` holds against the teacher's, and by which distance.

    In YAML a mapping, without a class path: ``outputs: {select: logits, temperature: 2.0}``.

    Attributes:
        select: Location of the tensor to match in the network's output: a key, attribute or index, such as
            ``"logits"``, or a list of them; None for the first tensor, False for none.
        loss: ``"kl"``, the divergence of class probabilities, for logits; ``"mse"`` or ``"cosine"`` for embeddings.
        temperature: Softens the probabilities, for ``"kl"``; above 0.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> MatchedOutputs(select="logits", temperature=2.0).loss
        'kl'
    """

    select: Select | Literal[False] = None
    loss: Literal["kl", "mse", "cosine"] = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _ = self.path
        check_choice("loss", self.loss, LOSSES)
        object.__setattr__(self, "temperature", check_positive_number("temperature", self.temperature))

    @property
    def path(self) -> tuple[Step, ...] | Literal[False] | None:
        """The steps that lead to the tensor; None for the first one, False for none."""
        return False if self.select is False else check_select(self.select)


@dataclass(frozen=True)
class Distance:
    """Distance by which two tensors are compared.

    Args:
        loss: ``"kl"`` of probabilities over the channels, ``"mse"`` or ``"cosine"``.
        temperature: Of the probabilities.
        layout: The dimensions, one letter each; for tensors of another number of dimensions the usual ones.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    loss: str = "mse"
    temperature: float = 1.0
    layout: str | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_positive_number("temperature", self.temperature)
        check_layout(self.layout)

    def places(self, name: str, tensor: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The channels at every position, and which positions count.

        Args:
            name: What the tensor is called in messages.
            tensor: A tensor of two dimensions or more.
            mask: The valid positions; see `pool_embeddings`.

        Returns:
            Tensors of shape ``(N, positions, C)`` and ``(N, positions)``.

        Raises:
            ValueError: If the layout or the mask does not fit.
            TypeError: If it is not a floating tensor.
        """
        check_floating(name, tensor)
        if mask is not None:
            check_real("mask", mask)
        layout = self.layout if self.layout and len(self.layout.replace("...", "")) == tensor.ndim else None
        layout = layout or _LAYOUTS.get(tensor.ndim)
        if layout is None:
            raise ValueError(f"`layout` must say what the dimensions of a tensor of shape {tuple(tensor.shape)} are")
        samples, channels = layout_axes(layout, tensor.ndim)
        ordered = tensor.movedim((samples, channels), (0, -1))
        placed = ordered.reshape(len(ordered), -1, ordered.shape[-1])
        ones = placed.new_ones(placed.shape[:2], dtype=torch.float32)
        if mask is None:
            return placed, ones
        if tensor.ndim == 2:
            valid = mask.reshape(len(mask), -1)
            if tuple(valid.shape) != (len(placed), 1):
                raise ValueError(
                    f"`mask` must have one entry for each of {len(placed)} rows, got shape {tuple(mask.shape)}; leave "
                    "it away where positions are pooled already"
                )
            return placed, valid.to(ones)
        marks = torch.ones_like(ordered[..., :1])
        return placed, pool_embeddings(marks, "flatten", layout="N...C", mask=mask).to(ones)

    def __call__(self, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        """The mean distance over the valid positions of all processes.

        Args:
            student: Tensor of shape ``(N, positions, C)``.
            teacher: The same of the teacher.
            valid: Tensor of shape ``(N, positions)``.

        Returns:
            Scalar: the mean over all processes as value, and a gradient whose average over the processes is that of it.

        Raises:
            ValueError: If the shapes differ.
        """
        with torch.autocast(student.device.type, enabled=False):
            if self.loss == "kl":
                distances = soft_target_divergence(student, teacher, temperature=self.temperature)
            else:
                distances = (feature_error if self.loss == "mse" else cosine_error)(student, teacher)
            # `where`, so that a NaN in the padding stays there
            total = torch.where(valid > 0, distances, 0).sum()
            count = valid.to(total.dtype).sum()
            if not is_distributed():
                return total / count.clamp_min(1)
            of_all = torch.stack([total.detach(), count])
            dist.all_reduce(of_all)
            mine = total * world_size() / of_all[1].clamp_min(1)
            return mine + (of_all[0] / of_all[1].clamp_min(1) - mine.detach())
