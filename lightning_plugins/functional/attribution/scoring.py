"""A model's score of a class, for many perturbed copies of inputs in batches."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_callable, check_choice
from lightning_plugins.functional.tensors import check_dims, check_floating, check_integers, check_real

Forward = Callable[[Tensor], Tensor]
Explain = Callable[[Tensor, Tensor], Tensor]  # from inputs and their classes to maps
Output = Literal["probability", "logit"]
OUTPUTS: tuple[Output, ...] = ("probability", "logit")
MAX_FORWARD_BATCH = 256  # default number of copies in one forward pass


def check_inputs(inputs: Tensor) -> None:
    """Raise an error unless these are samples with positions.

    Raises:
        TypeError: If it is not a tensor of real numbers.
        ValueError: If it has less than two dimensions.
    """
    check_real("inputs", inputs)
    check_dims("inputs", inputs, 2, "(B, [C,] *spatial)")


def class_scores(forward: Forward, inputs: Tensor, target: Tensor, *, output: Output = "logit") -> Tensor:
    """Run a model without gradients and select one class per row.

    Args:
        forward: Maps inputs to logits of shape ``(n, classes)``.
        inputs: Tensor of shape ``(n, ...)``.
        target: Class of each row, integers of shape ``(n,)``.
        output: ``"logit"``, or ``"probability"`` for its softmax over the classes.

    Returns:
        Tensor of shape ``(n,)``, at least in float32.

    Raises:
        TypeError: If the model returns no tensor, or ``target`` is not of integers.
        ValueError: If the logits have another shape, probabilities are requested of a single class, or a class is out
            of range.

    Example:
        >>> class_scores(lambda x: x, torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1]))
        tensor([0., 3.])
    """
    check_callable("forward", forward, "a function from inputs to logits")
    check_real("inputs", inputs)
    check_dims("inputs", inputs, 1, "(B, ...)")
    check_choice("output", output, OUTPUTS)
    with torch.no_grad():
        logits = forward(inputs)
    return pick(checked_logits(logits, len(inputs), output), checked_target(target, len(inputs)), output)


def checked_logits(logits: object, rows: int, output: Output) -> Tensor:
    """Return ``logits`` in at least float32 if they are valid.

    Args:
        logits: Output of a model.
        rows: Number of input rows.
        output: ``"logit"`` or ``"probability"``.

    Returns:
        The logits, of shape ``(rows, classes)``.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it has another shape, or probabilities are requested of a single class.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"`forward` must return a floating tensor of logits, got {type(logits).__name__}")
    check_floating("forward", logits)
    if logits.ndim != 2 or len(logits) != rows:
        raise ValueError(f"`forward` must return logits of shape ({rows}, classes), got {tuple(logits.shape)}")
    if output == "probability" and logits.shape[1] < 2:
        raise ValueError(
            "`forward` gives no probabilities: of one class the softmax is always 1; return logits of shape"
            " (n, 2), such as `torch.cat([-z, z], 1) / 2`, or take `output='logit'`"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def checked_target(target: object, rows: int) -> Tensor:
    """Return ``target`` if it has one class per row.

    Raises:
        TypeError: If it is not a tensor of integers.
        ValueError: If it has another shape.
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"`target` must be a tensor of class numbers, got {kind}")
    check_integers("target", target, "a tensor of class numbers")
    if target.shape != (rows,):
        raise ValueError(f"`target` must have shape ({rows},), one class for each sample, got {tuple(target.shape)}")
    return target


def pick(logits: Tensor, target: Tensor, output: Output) -> Tensor:
    """The target's score in each row; an invalid class raises on a CPU, and makes the kernel fail elsewhere."""
    if (
        target.device.type == "cpu"
        and target.numel()
        and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]
    ):
        raise ValueError(
            f"`target` must be in 0 to {logits.shape[1] - 1}, the classes of the model, got {int(target.min())} to"
            f" {int(target.max())}"
        )
    values = logits.softmax(1) if output == "probability" else logits
    return values.gather(1, target.to(values.device, torch.int64)[:, None])[:, 0]


def score_copies(
    forward: Forward, make: Callable[[Tensor, Tensor], Tensor], target: Tensor, copies: int, limit: int, output: Output
) -> Tensor:
    """Score ``copies`` copies of each sample, at most ``limit`` in total per forward pass.

    Args:
        forward: Maps inputs to logits.
        make: Builds ``n`` perturbed inputs from the indices of samples and of copies, both of shape ``(n,)``.
        target: Class of each sample, shape ``(B,)``.
        copies: Number of copies per sample.
        limit: Maximum number of inputs in a forward pass.
        output: See `class_scores`.

    Returns:
        Scores of shape ``(B, copies)``.
    """
    pairs = torch.arange(len(target) * copies, device=target.device)
    parts: Iterable[Tensor] = pairs.split(limit) if len(pairs) else ()
    found = [
        class_scores(forward, make(part // copies, part % copies), target[part // copies], output=output)
        for part in parts
    ]
    return torch.cat(found).reshape(len(target), copies) if found else torch.zeros(0, copies, device=target.device)
