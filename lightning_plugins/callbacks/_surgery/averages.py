"""Lightning's averages of weights, which hold a copy of the network, follow it through a compression."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule, Trainer, callbacks


def averages_of(trainer: Trainer) -> list[Any]:
    """List the Trainer's ``WeightAveraging`` callbacks, ``EMAWeightAveraging`` among them."""
    kind = getattr(callbacks, "WeightAveraging", None)  # it is not in every version of Lightning
    return [one for one in trainer.callbacks if kind is not None and isinstance(one, kind)]  # type: ignore[attr-defined]  # a connector of the Trainer sets `callbacks`


def renew_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Restart every weight average of a network with other shapes from a copy of the current module.

    There is no average of the small network's weights from before it was there, and none follows from that of the dense
    ones: the factors of a product are determined only up to a matrix between them.
    """
    for average in averages_of(trainer):
        held = average._average_model
        if held is not None and shapes_of(held.module) != shapes_of(pl_module):
            average.setup(trainer, pl_module, "fit")


def put_averages_in_place(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give the module the averaged weights, for a surgery that no training follows.

    Lightning does so when a training ends, before or after this: twice is as good as once.
    """
    for average in averages_of(trainer):
        if average._average_model is not None:
            average._copy_average_to_current(pl_module)


def pair_by_plain_names(trainer: Trainer, renamed: Mapping[str, str]) -> Callable[[], None]:
    """Let averages go on while parameters of the network are computed from others.

    Lightning pairs the tensors of network and average by their order, which parametrizations change. The average keeps
    the dense network; until the end of the pairing it meets the originals of the same names.

    Args:
        trainer: The Trainer inside of its `fit`.
        renamed: Names of the dense network's parameters, with those they have now.

    Returns:
        A function that ends it.
    """
    owners = []
    for average in averages_of(trainer):
        held = average._average_model
        for owner, name in (
            (average, "_swap_models"),
            (average, "_copy_average_to_current"),
            (held, "update_parameters"),
        ):
            setattr(owner, name, partial(_with_plain, getattr(owner, name), held.module, renamed))
            owners.append((owner, name))

    def end() -> None:
        for owner, name in owners:
            delattr(owner, name)

    return end


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's parameters by name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class _Plain:
    """The tensors of a network in the order of the dense one, without those that this does not have."""

    def __init__(self, network: nn.Module, dense: nn.Module, renamed: Mapping[str, str]) -> None:
        self._network, self._dense, self._renamed = network, dense, renamed

    def parameters(self) -> list[nn.Parameter]:
        own = dict(self._network.named_parameters(remove_duplicate=False))
        return [own[self._renamed.get(name, name)] for name, _ in self._dense.named_parameters()]

    def buffers(self) -> list[Tensor]:
        own = dict(self._network.named_buffers(remove_duplicate=False))
        return [own[name] for name, _ in self._dense.named_buffers()]


def _with_plain(act: Callable[[Any], None], dense: nn.Module, renamed: Mapping[str, str], network: nn.Module) -> None:
    act(_Plain(network, dense, renamed))
