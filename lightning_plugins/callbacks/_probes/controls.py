"""Controls of a probe: the network at the weights it began with, and random projections of its input."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_plugins._checks import check_names
from lightning_plugins._lightning import MisconfigurationException, ModelParallelStrategy, Trainer, isolate_rng
from lightning_plugins.callbacks._probes.capture import CopyingCapture
from lightning_plugins.functional.folds import group_normal

CONTROLS = ("initial", "projection")


def check_controls(controls: Sequence[str]) -> tuple[str, ...]:
    """Return the controls, each once.

    Raises:
        TypeError: If they are no strings.
        ValueError: If one is unknown.
    """
    return check_names("controls", controls, CONTROLS)


def require_whole_network(controls: Sequence[str], trainer: Trainer) -> None:
    """Raise an error for copying a network that is sharded over processes.

    Raises:
        MisconfigurationException: If one is wanted.
    """
    if "initial" in controls and isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "`controls`: 'initial' copies the network, and ModelParallelStrategy has split it over processes; leave "
            "'initial' out"
        )


class NetworkCalls:
    """Arguments of the calls of the child of a module that holds all chosen layers.

    Args:
        module: The module.
        layers: Clean names of the layers.

    Raises:
        MisconfigurationException: If the layers are not all in one child.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        roots = sorted({name.partition(".")[0] for name in layers})
        if len(roots) != 1:
            raise MisconfigurationException(
                "`controls`: 'initial' runs the child of the module that holds all `layers` a second time, and these "
                f"are in {', '.join(map(repr, roots))}; use one callback for each, or put them under one submodule"
            )
        self.root = roots[0]
        self.network = module.get_submodule(self.root)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._active = False
        network = self.network

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._active and module is network:  # a copy of the network has the same hook: not for it
                self._calls.append(tree_map(_detached, (args, kwargs)))

        self._handle = network.register_forward_pre_hook(hook, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember arguments inside this context."""
        self._calls.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def take(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of the calls since the last `recording`."""
        calls, self._calls = self._calls, []
        return calls

    def detach(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        self._calls.clear()


class InitialNetwork:
    """A copy of the network at given weights, in evaluation mode, that answers the calls of the network.

    Args:
        calls: Of the network.
        weights: Its state dict at the beginning; None takes the weights of now.
        layers: What to capture, as for the module.
    """

    def __init__(self, calls: NetworkCalls, weights: dict[str, Tensor] | None, layers: Sequence[str]) -> None:
        self._holder = nn.Module()
        self._network = copy.deepcopy(calls.network)
        if weights is not None:
            self._network.load_state_dict(weights)
        self._network.requires_grad_(False).eval()
        self._holder.add_module(calls.root, self._network)
        self._capture = CopyingCapture(self._holder, layers, needs_gradient=False)
        self._capture.attach()

    def weights(self) -> dict[str, Tensor]:
        """The weights, for a checkpoint."""
        return {name: value.cpu().clone() for name, value in self._network.state_dict().items()}

    def answer(
        self,
        calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, list[Tensor]]:
        """Run the calls.

        Args:
            calls: Arguments.
            context: Makes the context in which the module's steps run, such as autocast.

        Returns:
            By layer, one tensor for each of its calls.
        """
        with torch.no_grad(), isolate_rng(), context(), self._capture.recording():
            for args, kwargs in calls:
                self._network(*args, **kwargs)
        return self._capture.take()


def random_projection(inputs: Tensor, width: int, *, seed: int) -> Tensor:
    """Project a network's input by a fixed random matrix: what an untrained layer of this width knows.

    Args:
        inputs: Floating ``(N, ...)``, of which all but the first dimension are projected, ``(N, L, c)``, of which the
            last is, or integers ``(N, L)``, of which each number has a random row of its own.
        width: Number of columns.
        seed: Of the matrix.

    Returns:
        Tensor of shape ``(N, width)`` or ``(N, L, width)``.
    """
    columns = torch.arange(width, device=inputs.device)
    if not inputs.is_floating_point():
        return group_normal(inputs[..., None].long() * width + columns, seed=seed).float()
    flat = inputs if inputs.ndim == 3 else inputs.flatten(start_dim=1)
    places = torch.arange(flat.shape[-1], device=inputs.device)[:, None] * width + columns
    matrix = group_normal(places, seed=seed).to(flat) / flat.shape[-1] ** 0.5
    projected: Tensor = flat @ matrix
    return projected


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
