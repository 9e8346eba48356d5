"""Runs of a network that start where they first differ from the run before.

Two runs on the same input that differ in the weights of some layers are equal up to the first call of one of these. So
every run is recorded, and in the next one a module whose call had ended by then hands back what it gave, at the highest
level of the module tree at which that is possible. One run's outputs are in memory at a time.

That is exact for modules without randomness and without state of their own (the network in evaluation mode). A tensor
that something changed in place is never handed back, and a call that changed its input in place is made again. To spare
repeating a convolution that an in-place activation follows, its output is copied before the activation runs.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class PrefixReuse:
    """Records the calls of a model's modules while active, and replays the common prefix in the next run.

    Args:
        model: The network, in evaluation mode and run without gradients.
        layers: The layers whose weights change between runs.
        enabled: Whether anything is replayed; calls are recorded in any case.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], *, enabled: bool = True) -> None:
        self._model, self._enabled = model, enabled
        self._layers = layers
        self._calls: list[_Call] = []  # of the last run, in the order in which they began
        self._shared = 0  # this many of them are the calls of the present run too
        self._position = 0
        self._patched: list[tuple[nn.Module, Any]] = []
        self._seen_as: dict[str, nn.Module | None] = {}  # whose call stands for a layer's
        self._made_by: dict[int, _Call] = {}  # the calls that made tensors, by the tensors' ids

    def __enter__(self) -> Self:
        visible = list(_visible_modules(self._model))
        self._seen_as = _standing_for(self._model, self._layers, {id(module) for module in visible})
        for module in visible:
            self._patched.append((module, vars(module).get("forward")))
            hooked = any(below._forward_hooks or below._forward_pre_hooks for below in module.modules())
            replay = self._enabled and not hooked  # a hook must see its module's call
            vars(module)["forward"] = self._recorder(module, module.forward, replay=replay)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, own in self._patched:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
        self._patched.clear()
        self._made_by.clear()
        self.start(None)

    def start(self, changed: Iterable[str] | None) -> None:
        """Begin a run.

        Args:
            changed: The layers whose weights are others than in the last run; None if the input is another.
        """
        if changed is None or not self._enabled:
            self._shared = 0
        else:
            first = self.first_calls()
            self._shared = min((first[name] for name in changed), default=len(self._calls))
        del self._calls[self._shared :]
        kept = set(map(id, self._calls))  # outputs of other calls belong to a run that is over: free them
        self._made_by = {output: call for output, call in self._made_by.items() if id(call) in kept}
        self._position = 0

    def first_calls(self) -> dict[str, int]:
        """When each layer was first called in the last run.

        Returns:
            A number that grows, past that of the last call if the layer was not called; 0 for layers within something
            that is compiled or scripted as a whole and cannot be looked into.
        """
        order: dict[int, int] = {}
        for index, call in enumerate(self._calls):
            order.setdefault(id(call.module), index)
        never = len(self._calls)
        return {name: 0 if module is None else order.get(id(module), never) for name, module in self._seen_as.items()}

    def uncalled(self) -> list[str]:
        """The layers that the last run did not call, as far as that can be seen."""
        called = {id(call.module) for call in self._calls}
        return [name for name, module in self._seen_as.items() if module is not None and id(module) not in called]

    def _recorder(self, module: nn.Module, forward: Callable[..., Any], *, replay: bool) -> Callable[..., Any]:
        costly = replay and any(parameter.ndim > 1 for parameter in module.parameters())
        in_place = replay and getattr(module, "inplace", False) is True

        def run(*args: Any, **kwargs: Any) -> Any:
            index = self._position
            if index < self._shared and self._calls[index].module is not module:
                self._shared = index  # the model took another path; everything from here on is new
                del self._calls[index:]
            if index < self._shared:
                call = self._calls[index]
                if replay and call.end <= self._shared and call.holds():
                    self._position = call.end
                    return call.output()
            else:
                call = _Call(module)
                self._calls.append(call)
            self._position = index + 1
            if in_place and args and (maker := self._made_by.get(id(args[0]))) is not None:
                maker.save(args[0])
            before = _versions((args, kwargs)) if replay else None
            output = forward(*args, **kwargs)
            call.end = self._position
            call.drop()
            if replay and _unchanged(before):
                call.keep(output)
                if costly and isinstance(output, Tensor) and not _shares_memory(output, (args, kwargs)):
                    self._made_by[id(output)] = call
            return output

        return run


class _Call:
    """One call of a module: the end of its own calls in the record, and its output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.end = sys.maxsize  # until it returns
        self.drop()

    def drop(self) -> None:
        """Forget the output."""
        self._leaves: list[Any] = []
        self._form: TreeSpec | None = None
        self._versions: list[tuple[Tensor, int]] | None = None
        self._saved: Tensor | None = None

    def save(self, output: Tensor) -> None:
        """Keep a copy of an output that is about to be changed."""
        if self._saved is None and self._leaves and self._leaves[0] is output and _unchanged(self._versions):
            self._saved = output.clone()

    def keep(self, output: Any) -> None:
        """Remember the output, unless it holds something that could change unseen."""
        leaves, form = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
        if all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            self._leaves, self._form, self._versions = leaves, form, _versions(leaves)

    def holds(self) -> bool:
        """Return whether the output is known."""
        return _unchanged(self._versions) or self._saved is not None

    def output(self) -> Any:
        """The output, in containers of its own."""
        if self._saved is not None:
            return self._saved.clone()  # this one will be changed again
        return self._leaves[0] if self._form is None else tree_unflatten(self._leaves, self._form)


def _versions(values: Any) -> list[tuple[Tensor, int]] | None:
    """The tensors in ``values`` and how often each was changed; None if one does not count its changes."""
    tensors = _tensors(values)
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor, tensor._version) for tensor in tensors]


def _unchanged(versions: list[tuple[Tensor, int]] | None) -> bool:
    return versions is not None and all(tensor._version == version for tensor, version in versions)


def _shares_memory(output: Tensor, inputs: Any) -> bool:
    """Return whether a call returned one of its inputs or a view of one: a copy would not change with it."""
    memory = output.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == memory for tensor in _tensors(inputs))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested containers; the usual forms first, since walking through containers takes long."""
    if isinstance(values, tuple) and len(values) == 2 and isinstance(values[0], tuple) and values[1] == {}:
        values = values[0]  # arguments without keywords
    if isinstance(values, list | tuple) and all(isinstance(value, Tensor) for value in values):
        return list(values)
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


def _closed(module: nn.Module) -> bool:
    """Return whether calls inside are traced or scripted: the module is one block."""
    return isinstance(module, torch.jit.ScriptModule) or getattr(module, "_compiled_call_impl", None) is not None


def _visible_modules(model: nn.Module) -> Iterable[nn.Module]:
    """The modules whose calls go through their ``forward``, each once."""
    seen, stack = set(), [model]
    while stack:
        module = stack.pop()
        if id(module) in seen or _closed(module):
            continue
        seen.add(id(module))
        yield module
        if "_orig_mod" not in module._modules:  # below stands what `torch.compile` traced
            stack.extend(module.children())


def _standing_for(model: nn.Module, layers: Mapping[str, nn.Module], visible: set[int]) -> dict[str, nn.Module | None]:
    """For every layer the module whose call shows that it is called: itself, or the block it is inside of."""
    found: dict[int, nn.Module | None] = {}

    def walk(module: nn.Module, around: nn.Module | None) -> None:
        nearest = module if id(module) in visible else around
        if id(module) in found:
            return
        found[id(module)] = nearest
        for child in module.children():
            walk(child, nearest)

    walk(model, None)
    return {name: found[id(module)] for name, module in layers.items()}
