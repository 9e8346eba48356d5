"""Order in which the tasks of a batch are computed: all at once, one by one, or in chunks."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins.meta.loop.structure import TaskBatch
from lightning_plugins.meta.loop.tasks import Draws, chunk_by_chunk, over_tasks

Vectorize = bool | Literal["auto"]
Randomness = Literal["different", "same"]

_PIXELS = 64 * 64  # image size from which vectorised convolutions are slower on a CPU than a loop over tasks


@dataclass(frozen=True, kw_only=True)
class Vectorization:
    """Order in which an inner loop computes the tasks of a batch, and how many at a time.

    In YAML a mapping, without a class path: ``vectorize: {chunk_size: 2}``.

    Attributes:
        mode: Whether to use ``torch.func.vmap``; otherwise the tasks run one after the other. ``"auto"`` chooses the
            faster form (on a CPU a loop for convolutions of large images), and falls back to a loop with one warning
            for models that ``vmap`` does not support, such as recurrent ones.
        chunk_size: Number of tasks, at least 1, whose graph is in memory at a time; None for all.
        randomness: Whether dropout draws ``"different"`` or the ``"same"`` masks for the tasks.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> Vectorization(chunk_size=2)
        Vectorization(mode='auto', chunk_size=2, randomness='different')
    """

    mode: Vectorize = "auto"
    chunk_size: int | None = None
    randomness: Randomness = "different"

    def __post_init__(self) -> None:
        check_vectorize("mode", self.mode)
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", check_positive_int("chunk_size", self.chunk_size))
        check_choice("randomness", self.randomness, get_args(Randomness))


def as_vectorization(vectorize: Vectorize | Vectorization) -> Vectorization:
    """Return the settings that an argument ``vectorize`` stands for."""
    if isinstance(vectorize, Vectorization):
        return vectorize
    return Vectorization(mode=check_vectorize("vectorize", vectorize))


def check_vectorize(name: str, vectorize: object) -> Any:
    """Raise an error for anything but True, False and "auto"."""
    if not isinstance(vectorize, bool) and not (isinstance(vectorize, str) and vectorize == "auto"):
        kind = ValueError if isinstance(vectorize, str) else TypeError
        raise kind(f'`{name}` must be True, False or "auto", got {vectorize!r}')
    return vectorize


class Plan(NamedTuple):
    """The settings of a call.

    Attributes:
        vectorize: ``"auto"`` vectorises where that is not slower.
        chunk_size: Number of tasks whose graph is in memory at a time.
        same_draws: Whether dropout draws the same masks for all tasks.
        chunked: Whether the gradient is computed after every chunk.
    """

    vectorize: Vectorize
    chunk_size: int | None
    same_draws: bool
    chunked: bool


class Form:
    """Computes tasks by a plan; in a loop if ``"auto"`` found that `vmap` does not support the model."""

    def __init__(self) -> None:
        self._failed = False

    def run(
        self, task: Callable[..., tuple[Tensor, ...]], model: nn.Module, batch: TaskBatch, plan: Plan
    ) -> tuple[Any, ...]:
        """Call ``task`` with a flag for vectorisation and a task's parts."""

        def call(vectorize: bool) -> tuple[Any, ...]:
            return _computed(task, batch, plan._replace(vectorize=vectorize))

        if plan.vectorize == "auto":
            return call(False) if self._failed or looped_is_faster(model, batch) else self._tried(call, batch)
        try:
            return call(plan.vectorize)
        except Exception as error:
            if plan.vectorize and not isinstance(error, torch.OutOfMemoryError):
                error.add_note(
                    "`vectorize=True` computes all tasks at once by `torch.func.vmap`, which not every model can do;"
                    ' `vectorize=False` or "auto" computes one task after the other'
                )
            raise

    def _tried(self, call: Callable[[bool], tuple[Any, ...]], batch: TaskBatch) -> tuple[Any, ...]:
        draws = Draws(batch.first.device)
        try:
            return call(True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  # the loop below raises again what is not of vmap
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        draws.restore()
        result = call(False)
        self._failed = True
        warnings.warn(
            f'`vectorize="auto"`: the tasks are computed one after the other, since vectorising them failed ({reason});'
            " pass `vectorize=False` to do so from the start",
            stacklevel=2,
        )
        return result


def _computed(task: Callable[..., tuple[Tensor, ...]], batch: TaskBatch, plan: Plan) -> tuple[Any, ...]:
    vectorize = bool(plan.vectorize)

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        return task(vectorize, *batch.unpacked(tensors))

    def over(batch: TaskBatch) -> tuple[Any, ...]:
        return over_tasks(of_tensors, batch, vectorize, plan.chunk_size, plan.same_draws)

    if not plan.chunked or plan.chunk_size is None:
        return over(batch)
    draws = Draws(batch.first.device) if plan.same_draws else None
    return chunk_by_chunk(over, batch, plan.chunk_size, draws)


def looped_is_faster(model: nn.Module, batch: TaskBatch) -> bool:
    """Tell whether to compute task by task: for convolutions of large images on a CPU."""
    if batch.first.device.type != "cpu" or not any(parameter.ndim >= 4 for parameter in model.parameters()):
        return False
    return any(tensor.ndim >= 5 and tensor.shape[-1] * tensor.shape[-2] >= _PIXELS for tensor in batch.groups[0])
