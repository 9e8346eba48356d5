"""Forward hooks that remember what named layers produced while a step was recorded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.callbacks._rows.compiled import is_compiled
from lightning_plugins.callbacks._rows.hooks import Hook
from lightning_plugins.callbacks._rows.layouts import LayerLayout
from lightning_plugins.callbacks._rows.masks import LayerCall, Parameters
from lightning_plugins.callbacks._rows.readout import Readout
from lightning_plugins.callbacks._rows.select import selected
from lightning_plugins.selection import TensorRef, module_at, select_tensors

_OWN = Readout()


class NotCapturedError(MisconfigurationException):
    """A layer has no tensor to take.

    Args:
        message: Names the layer.
        place: Its index among the layers.
    """

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


class _Seen(NamedTuple):
    """A call that was recorded, and how often its tensor had been written into then; None where that is not known."""

    call: LayerCall
    version: int | None


class LayerRows:
    """The rows of named layers of a model, of every call of theirs while `recording`.

    Only the raw tensors are kept, with what the calls received: work done inside a hook would run again, and save other
    tensors, when activation checkpointing recomputes the layer.

    Args:
        model: The model.
        layers: As for `select_tensors`.
        rows: How tensors become rows.
        needs_gradient: Whether a gradient is to flow back from the rows.
    """

    def __init__(
        self, model: nn.Module, layers: str | Sequence[str], rows: Readout = _OWN, *, needs_gradient: bool = True
    ) -> None:
        self._model = model
        self._rows = rows
        self._needs_gradient = needs_gradient
        self._references = _labelled(select_tensors(model, layers))
        names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
        self._places = {label: names[id(reference.module)] for label, reference in self._references.items()}
        self._layouts: dict[str, LayerLayout] = {
            label: rows.layout_of(model, reference) for label, reference in self._references.items()
        }
        self._parameters: dict[nn.Module, Parameters] = {}
        self._seen: dict[str, list[_Seen]] = {label: [] for label in self._references}
        self._without_gradient: set[str] = set()  # layers that ran, but under no_grad only
        self._around: list[tuple[nn.Module, Mapping[str, Any]]] = []  # calls under way, the outermost first
        self._batch: Any = None
        self._active = self._stays = False
        self._handles: list[RemovableHandle] = []

    @property
    def labels(self) -> list[str]:
        """All layers, whether they run or not, in the same order on every process."""
        return list(self._references)

    @property
    def log_names(self) -> list[tuple[str, str]]:
        """By label, the names to log under: the label, and the one to go by where another callback has that."""
        return [(label, f"{r.name}.{r.side}") for label, r in self._references.items()]

    def attach(self) -> None:
        """Register hooks; nothing is stored before `recording` begins.

        Hooks are on the modules while a step is recorded and at no other time, so that between steps the model can be
        copied, pickled and scripted. Compiled code must have seen them when it is made: there they stay.
        """
        self._stays = is_compiled(self._model)
        if self._stays:
            self._hook()

    def detach(self) -> None:
        """Remove the hooks and drop the stored tensors."""
        self._stays = False
        self._unhook()
        self._clear()

    @contextmanager
    def recording(self, batch: Any = None) -> Iterator[None]:
        """Remember the layers' tensors inside this context, and forget those of an earlier one.

        Args:
            batch: The batch of the step, in which a mask may be.
        """
        self._clear()
        self._batch = batch
        self._follow()
        if not self._stays:
            self._hook()
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._around.clear()
            self._batch = None
            if not self._stays:
                self._unhook()

    def take(self) -> dict[str, list[Tensor]]:
        """Return the tensors recorded since the last `recording`.

        Returns:
            By layer, the embeddings, of shape ``(N, d)``, of each of its calls.

        Raises:
            NotCapturedError: If a layer did not run, or ran without a gradient although one is recorded, or
                its tensor was changed in place by what came after.
            ValueError: If a layer's tensor can't be pooled, its layout is not known or its mask does not fit.
            TypeError: If something that should be a tensor is none.
        """
        for place, (label, seen) in enumerate(self._seen.items()):
            if not seen:
                raise NotCapturedError(self._why_not_seen(label), place)
            if any(_data(call.features)._version != version for call, version in seen if version is not None):
                raise NotCapturedError(
                    f"`layers`: the tensor of {label!r} was changed in place by a later operation, such as "
                    "`ReLU(inplace=True)` or `x += y`, so it is no longer what the layer gave. Name the layer "
                    "that made the change, or let it write a tensor of its own (`inplace=False`).",
                    place,
                )
        taken = {
            label: [self._rows.of(call, self._layouts[label], label) for call, _ in seen]
            for label, seen in self._seen.items()
        }
        self._clear()
        return taken

    def _why_not_seen(self, label: str) -> str:
        if label in self._without_gradient:
            return (
                f"`layers`: {label!r} ran under `torch.no_grad()` only, so no gradient can flow from its tensor. "
                "Inside reentrant activation checkpointing pass `use_reentrant=False`; for a network that is not "
                "trained (a teacher, a frozen trunk) name a layer that is."
            )
        return (
            f"`layers`: {label!r} was not called in this step. Name a layer that every step calls through its "
            "`__call__` (functions such as `F.linear(x, layer.weight)` go past it)."
        )

    def _clear(self) -> None:
        for seen in self._seen.values():
            seen.clear()
        self._without_gradient.clear()

    def _hook(self) -> None:
        if self._handles:
            return
        if self._rows.masked:
            for module in _around(self._model, [reference.module for reference in self._references.values()]):
                self._hook_around(module)
        for label, (_, module, side) in self._references.items():
            self._parameters.setdefault(module, Parameters(module))
            if side == "input":
                hook = Hook(module, _Act(self, label, module, output=False))
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                hook = Hook(module, _Act(self, label, module, output=True))
                handle = module.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)

    def _hook_around(self, module: nn.Module) -> None:
        self._parameters.setdefault(module, Parameters(module))
        enter, leave = Hook(module, _Enter(self, module)), Hook(module, _Leave(self, module))
        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        # compiled code cannot be left by an error and resumed
        self._handles.append(module.register_forward_hook(leave, always_call=not self._stays))

    def _follow(self) -> None:
        """Handle the replacement of a layer, such as by its factors."""
        changed = False
        for label, reference in self._references.items():
            module = module_at(self._model, self._places[label])
            if module is not None and module is not reference.module:
                self._references[label] = reference._replace(module=module)
                self._layouts[label] = self._rows.layout_of(self._model, self._references[label])
                changed = True
        if changed and self._handles:
            self._unhook()
            self._hook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, label: str, value: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
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
        self._remember(label, self._call(label, value, module, args, kwargs))

    def _call(self, label: str, value: Any, module: nn.Module, args: Any, kwargs: Any) -> LayerCall:
        features = selected(value, self._rows.path, label)
        if not self._rows.masked:
            return LayerCall(features, {})
        around = tuple(arguments for _, arguments in reversed(self._around))
        return LayerCall(features, self._parameters[module].bound(args, kwargs), around, self._batch)

    def _remember(self, label: str, call: LayerCall) -> None:
        # Tensors of inference mode, where nothing needs a gradient, do not count their changes; those that compiled
        # code returns count what was written into their memory while they were computed.
        countable = self._needs_gradient and not torch.compiler.is_compiling()
        self._seen[label].append(_Seen(call, _data(call.features)._version if countable else None))


class _Act:
    """Function of a hook on a layer."""

    def __init__(self, capture: LayerRows, label: str, module: nn.Module, *, output: bool) -> None:
        self._capture, self._label, self._module, self._output = capture, label, module, output

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if not self._capture._active:
            return
        value = output
        if not self._output:
            by_name = self._capture._rows.path is not None and isinstance(self._capture._rows.path[0], str)
            value = args if args and not by_name else kwargs
            if by_name:
                value = self._capture._parameters[self._module].bound(args, kwargs)
        self._capture._see(self._label, value, self._module, args, kwargs)


class _Enter:
    """Records the arguments of an enclosing module."""

    def __init__(self, capture: LayerRows, module: nn.Module) -> None:
        self._capture, self._module = capture, module

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._capture._active:
            bound = self._capture._parameters[self._module].bound(args, kwargs)
            self._capture._around.append((self._module, bound))


class _Leave:
    """Forgets it when the module's call ends."""

    def __init__(self, capture: LayerRows, module: nn.Module) -> None:
        self._capture, self._module = capture, module

    def __call__(self, args: tuple[Any, ...], output: Any) -> None:
        around = self._capture._around
        if self._capture._active and around and around[-1][0] is self._module:
            around.pop()


def _data(features: Tensor | PackedSequence) -> Tensor:
    return features.data if isinstance(features, PackedSequence) else features


def _around(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that stand around some of the layers, under any of their names."""
    named = list(model.named_modules(remove_duplicate=False))
    chosen = {id(layer) for layer in layers}
    names = [name for name, module in named if id(module) in chosen]
    prefixes = {name[:at] for name in names for at in range(len(name)) if name[at] == "."} | {""}
    return list(dict.fromkeys(module for name, module in named if name in prefixes))


def _labelled(references: Sequence[TensorRef]) -> dict[str, TensorRef]:
    """By layer name; a layer of which both sides are taken goes by ``name.input`` and ``name.output``."""
    sides = Counter(reference.name for reference in references)
    return {r.name if sides[r.name] == 1 else f"{r.name}.{r.side}": r for r in references}
