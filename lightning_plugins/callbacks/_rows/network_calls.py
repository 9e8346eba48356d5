"""The calls of a network during a step: its inputs and outputs, and the outputs of its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.callbacks._rows.hooks import Hook
from lightning_plugins.callbacks._rows.select import first_tensor


@dataclass
class NetworkCall:
    """One call of a network.

    Attributes:
        args: What it received.
        kwargs: What it received by name.
        output: What it returned.
        layers: The tensors of layers in it, by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    layers: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)


class NetworkCalls:
    """Records the calls of a network, each with the tensors of named layers, while `recording`.

    Args:
        network: The network.
        layers: Names of layers in it.
        role: How messages call it: the argument that named it.
        needs_gradient: Whether calls without gradients are passed over, such as those of a copy for targets.
        compiled: Whether code around it is compiled, which must have seen the hooks when it is made.

    Raises:
        ValueError: If it has no such layer.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], *, role: str, needs_gradient: bool, compiled: bool = False
    ) -> None:
        self._network, self._role, self._needs_gradient = network, role, needs_gradient
        modules = dict(network.named_modules(remove_duplicate=False))
        if missing := [name for name in layers if name not in modules]:
            few = ", ".join(list(modules)[1:6])
            raise ValueError(f"`layers`: the {role} {type(network).__name__} has no {missing[0]!r}; it has {few}, ...")
        self._layers = {name: modules[name] for name in layers}
        self._calls: list[NetworkCall] = []
        self._under_way: NetworkCall | None = None
        self._active = False
        self._handles: list[RemovableHandle] = []
        self._stays = compiled
        if self._stays:
            self._hook()

    def fits(self, network: nn.Module) -> bool:
        """Return whether its hooks are on this network and its layers as they are now.

        Args:
            network: The network; layers of it may have been replaced.

        Returns:
            Whether it does.
        """
        modules = dict(network.named_modules(remove_duplicate=False)) if self._layers else {}
        return network is self._network and all(modules.get(name) is layer for name, layer in self._layers.items())

    def detach(self) -> None:
        """Remove the hooks, and forget the calls."""
        self._unhook()
        self._calls.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember the calls inside this context, and forget those of an earlier one.

        Yields:
            Nothing.
        """
        self._calls.clear()
        if not self._stays:
            self._hook()
        self._active = True
        try:
            yield
        finally:
            self._active, self._under_way = False, None
            if not self._stays:
                self._unhook()

    def take(self) -> list[NetworkCall]:
        """Hand over the calls of the last `recording`.

        Returns:
            The calls, in their order.

        Raises:
            MisconfigurationException: If there was none, a layer did not run in one, or a tensor was changed in place.
        """
        calls, self._calls = self._calls, []
        if not calls:
            raise MisconfigurationException(
                f"`network`: the {self._role} {type(self._network).__name__} was not called with gradients in this "
                "step; name the module that `training_step` calls, through its `__call__`"
            )
        for call in calls:
            for name in self._layers:
                tensor = call.layers.get(name)
                if tensor is None:
                    raise MisconfigurationException(f"`layers`: {name!r} did not run in a call of the {self._role}")
                if not self._stays and call.versions[name] != _version(tensor):
                    raise MisconfigurationException(
                        f"`layers`: the tensor of {name!r} was changed in place by a later operation, such as "
                        "`ReLU(inplace=True)`; name the layer that made the change"
                    )
        return calls

    def _hook(self) -> None:
        own = self._network
        enter, leave = Hook(own, self._enter), Hook(own, self._leave)
        self._handles.append(own.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(own.register_forward_hook(leave, with_kwargs=True))
        for name, layer in self._layers.items():
            if layer is not own:
                self._handles.append(layer.register_forward_hook(Hook(layer, _Note(self, name))))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active and (torch.is_grad_enabled() or not self._needs_gradient):
            self._under_way = NetworkCall(args, kwargs)

    def _leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, self._under_way = self._under_way, None
        if self._active and call is not None:
            call.output = output
            self._calls.append(call)

    def _note(self, name: str, output: Any) -> None:
        if self._active and self._under_way is not None:
            tensor = first_tensor(output, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"`layers`: {name!r} gave packed sequences; name a layer that gives a tensor")
            self._under_way.layers[name] = tensor
            self._under_way.versions[name] = _version(tensor)


class _Note:
    """Function of a hook on a layer."""

    def __init__(self, calls: NetworkCalls, name: str) -> None:
        self._calls, self._name = calls, name

    def __call__(self, args: tuple[Any, ...], output: Any) -> None:
        self._calls._note(self._name, output)


def layer_pairs(layers: Any) -> dict[str, str]:
    """Names of the teacher's layers by those of the student's.

    Args:
        layers: A name, a sequence of names, or a mapping.

    Returns:
        The mapping; layers without another name of the teacher's go by their own.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If a name is empty, a glob, or has a side.
    """
    rule = "`layers` must be names of layers, or a mapping from those of the student to those of the teacher"
    pairs = {layers: layers} if isinstance(layers, str) else layers
    if isinstance(pairs, Sequence):
        pairs = {name: name for name in pairs} if all(isinstance(name, str) for name in pairs) else {0: 0}
    if not isinstance(pairs, Mapping):
        raise TypeError(f"{rule}, got {type(layers).__name__}")
    for names in pairs.items():
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{rule}, got {layers!r}")
            if not name or "*" in name or ":" in name:
                raise ValueError(f"{rule}, without globs and sides, got {name!r}")
    return dict(pairs)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() or torch.compiler.is_compiling() else tensor._version
