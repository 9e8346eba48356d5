"""Row-wise distances of a network's outputs and features from those of a teacher."""

import torch
from torch import Tensor

from lightning_plugins._checks import check_positive_number
from lightning_plugins.functional.tensors import check_dims, check_floating


def soft_target_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Divergence between the student's and the teacher's class probabilities, both softened by a temperature.

    ``T**2 * KL(softmax(teacher / T) || softmax(student / T))``, in nats. The factor makes the scale of the gradient
    independent of the temperature.

    Args:
        student: Logits, floating tensor of shape ``(..., classes)``.
        teacher: Logits of the same shape, treated as constants.
        temperature: Above 0; larger values give small probabilities more weight.

    Returns:
        Tensor of shape ``(...)``, at least 0 up to rounding, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, or the temperature is not above 0.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> soft_target_divergence(logits, logits + 5, temperature=2.0).abs() < 1e-6
        tensor([True])

    Source:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531.
    """
    check_positive_number("temperature", temperature)
    student, teacher = _wide(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        wanted = torch.log_softmax(teacher / temperature, -1)
        found = torch.log_softmax(student / temperature, -1)
        difference = torch.where(wanted == -torch.inf, 0, wanted - found)  # a class that the teacher rules out
        return temperature * temperature * (wanted.exp() * difference).sum(-1)


def feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the features of the squared difference.

    Args:
        student: Floating tensor of shape ``(..., d)``.
        teacher: The teacher's features, treated as constant.

    Returns:
        Tensor of shape ``(...)``, at least 0, in float32 or wider.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> feature_error(torch.zeros(2, 4), torch.ones(2, 4))
        tensor([1., 1.])

    Source:
        Romero et al., FitNets, ICLR 2015, https://arxiv.org/abs/1412.6550.
    """
    student, teacher = _wide(student, teacher)
    return (student - teacher).square().mean(-1)


def cosine_error(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between the student's and the teacher's features.

    Args:
        student: Floating tensor of shape ``(..., d)``.
        teacher: The teacher's features, treated as constant.

    Returns:
        Tensor of shape ``(...)``, in [0, 2], in float32 or wider; 1 where a row is zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> cosine_error(torch.eye(2), torch.ones(2, 2)).round(decimals=4)
        tensor([0.2929, 0.2929])
    """
    student, teacher = _wide(student, teacher)
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("student", student)
    check_floating("teacher", teacher)
    check_dims("student", student, 1, "(..., d)")
    if student.shape != teacher.shape:
        raise ValueError(
            f"`teacher` must give what `student` gives, of shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(kind), teacher.detach().to(kind)
