"""Forward hooks that remember what named layers produced while a step was recorded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.selection import TensorRef, select_tensors


class LayerCapture:
    """The tensors that named layers of a model received or returned, while `recording`.

    Only the raw tensors are kept: work done inside a hook would run again, and save other tensors, when activation
    checkpointing recomputes the layer.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], *, needs_gradient: bool) -> None:
        self._needs_gradient = needs_gradient
        self._references = _labelled(select_tensors(model, layers))
        self._tensors: dict[str, list[Tensor]] = {label: [] for label in self._references}
        # How often each tensor had been changed in place when it was seen; None where that cannot be known.
        self._versions: dict[str, list[int | None]] = {label: [] for label in self._references}
        self._without_gradient: set[str] = set()  # layers that ran, but under no_grad only
        self._active = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks; nothing is remembered before `recording` begins."""
        for label, (_, module, side) in self._references.items():
            if side == "input":
                handle = module.register_forward_pre_hook(self._input_hook(label, module), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._output_hook(label, module))
            self._handles.append(handle)

    def detach(self) -> None:
        """Remove the hooks and drop what was remembered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the layers' tensors inside this context, and forget those of an earlier one."""
        self._clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def take(self) -> dict[str, list[Tensor]]:
        """Hand over what was recorded since the last `recording`.

        Returns:
            By layer, one tensor for each of its calls.

        Raises:
            MisconfigurationException: If a layer did not run, or ran without a gradient although one is recorded, or
                its tensor was changed in place by what came after.
        """
        for label, tensors in self._tensors.items():
            if tensors:
                if any(map(_changed, tensors, self._versions[label])):
                    raise MisconfigurationException(
                        f"`layers`: the tensor of {label!r} was changed in place by a later operation, such as "
                        "`ReLU(inplace=True)` or `x += y`, so it is no longer what the layer gave. Name the layer "
                        "that made the change, or let it write a tensor of its own (`inplace=False`)."
                    )
                continue
            if label in self._without_gradient:
                raise MisconfigurationException(
                    f"`layers`: {label!r} ran under `torch.no_grad()` only, so no gradient can flow from its tensor. "
                    "Inside reentrant activation checkpointing pass `use_reentrant=False`; for a network that is not "
                    "trained (a teacher, a frozen trunk) name a layer that is."
                )
            raise MisconfigurationException(
                f"`layers`: {label!r} was not called in this step. Name a layer that every step calls through its "
                "`__call__` (functions such as `F.linear(x, layer.weight)` go past it)."
            )
        taken = {label: list(tensors) for label, tensors in self._tensors.items()}
        self._clear()
        return taken

    def _clear(self) -> None:
        for label, tensors in self._tensors.items():
            tensors.clear()
            self._versions[label].clear()
        self._without_gradient.clear()

    def _remember(self, label: str, value: Any) -> None:
        # compiled code has no transforms around the step, and the question would break its graph
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise MisconfigurationException(
                f"`layers`: {label!r} ran inside a transform of `torch.func` (vmap, grad), and its tensor does not "
                "exist outside. Name a layer that runs outside; a module with `MAMLMixin` brings the tensors of a "
                f"layer of its network out with `features={label!r}`, and 'query_features' is the layer to name here."
            )
        if self._needs_gradient and not torch.is_grad_enabled():
            self._without_gradient.add(label)  # a stop-gradient pass, or a reentrant checkpoint
            return
        tensor = first_tensor(value, label)
        self._tensors[label].append(tensor)
        # Tensors of inference mode, where nothing needs a gradient, do not count their changes; those that compiled
        # code returns count what was written into their memory while they were computed.
        countable = self._needs_gradient and not torch.compiler.is_compiling()
        self._versions[label].append(tensor._version if countable else None)

    # A copy of the model (a teacher, an average of weights) has the same hook functions: they must not answer there.
    def _input_hook(self, label: str, own: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active and module is own:
                self._remember(label, args if args else kwargs)

        return hook

    def _output_hook(self, label: str, own: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active and module is own:
                self._remember(label, output)

        return hook


def _changed(tensor: Tensor, version: int | None) -> bool:
    return version is not None and tensor._version != version


def _labelled(references: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """By layer name; a layer of which both sides are taken goes by ``name.input`` and ``name.output``."""
    sides = Counter(reference.name for reference in references)
    return {r.name if sides[r.name] == 1 else f"{r.name}.{r.side}": r for r in references}


def first_tensor(value: Any, label: str) -> Tensor:
    """The tensor in what a layer received or returned.

    Args:
        value: A tensor, a tuple or list or dictionary of keyword arguments whose first entry is one, or a transformers
            output, of which ``last_hidden_state`` is taken.
        label: The layer's name, for the message.

    Returns:
        The tensor itself.

    Raises:
        TypeError: If there is no tensor at that place.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping) and value:
        return first_tensor(value.get("last_hidden_state", next(iter(value.values()))), label)
    if isinstance(value, tuple | list) and value:
        return first_tensor(value[0], label)
    raise TypeError(
        f"`layers`: {label!r} gave {type(value).__name__}, not a tensor; name a layer that returns one, "
        "or the input of the layer that takes it ('name:input')"
    )
