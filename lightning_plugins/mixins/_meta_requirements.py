"""Requirements of the meta-learning mixins on the class, the Trainer and the batch."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_plugins._lightning import PACKAGE, LightningModule, MisconfigurationException, ModelParallelStrategy
from lightning_plugins.callbacks._rows.hooks import Hook
from lightning_plugins.callbacks._trainer.requirements import require_supported_strategy
from lightning_plugins.mixins._packages import refuse_other_package

Samples = tuple[Tensor, Tensor]


def require_order(cls: type, mixin: type) -> None:
    """Raise an error if LightningModule's methods take precedence over the mixin's, or it is of another package.

    Raises:
        TypeError: With the correct order of bases, or the package.
    """
    refuse_other_package(cls, mixin)
    if LightningModule in cls.__mro__ and cls.__mro__.index(LightningModule) < cls.__mro__.index(mixin):
        written = next((base for base in cls.__bases__ if issubclass(base, mixin)), mixin).__name__
        raise TypeError(
            f"`{written}` must come before LightningModule, as in `class {cls.__name__}({written}, LightningModule)`,"
            " got it after"
        )


def require_lightning_module(module: object, mixin: type) -> None:
    """Raise an error for objects that are not a LightningModule of the package that this process uses.

    Raises:
        TypeError: With the correct order of bases.
    """
    if not isinstance(module, LightningModule):
        kind = type(module).__name__
        raise TypeError(
            f"`{mixin.__name__}` must be mixed into a LightningModule of `{PACKAGE}`, as in"
            f" `class {kind}({mixin.__name__}, LightningModule)`, got {kind}"
        )


def require_network(network: object) -> nn.Module:
    """Raise an error for anything but a module instance."""
    if not isinstance(network, nn.Module):
        got = f"the class {network.__name__}; make one of it" if isinstance(network, type) else type(network).__name__
        raise TypeError(f"`network` must be a torch module, got {got}")
    return network


def require_whole_parameters(module: LightningModule) -> None:
    """Raise an error for strategies that shard parameters: an inner loop replaces full ones.

    Raises:
        MisconfigurationException: For any but single-device and DDP training.
    """
    if module._trainer is None:
        return
    name = type(module).__name__
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"{name}: the inner loop adapts whole parameters, and FSDP2 (ModelParallelStrategy) splits them over ranks;"
            " pass `strategy='ddp'`, and `chunk_size` if memory is short"
        )
    require_supported_strategy(name, module.trainer)


def refuse_hooks(network: nn.Module) -> None:
    """Raise an error for callbacks on layers of the network: there they would capture tensors of torch transforms.

    Raises:
        MisconfigurationException: With the alternative.
    """
    for name, module in network.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, Hook):
                raise MisconfigurationException(
                    f"`layers`: {name!r} of the network runs inside of the inner loop, once for every step and for all"
                    f" tasks at once, where a callback cannot take its tensor. Pass `features={name!r}` to the mixin"
                    " and give the callback `layers='query_features'`: what the adapted networks make of the query."
                )


def unpacked(batch: object) -> tuple[Samples, Samples]:
    """The support and the query of a batch; the inner loop does further checks."""
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != 2:
        shown = f"{len(batch)} things" if isinstance(batch, Sequence) else type(batch).__name__
        raise TypeError(
            "`batch` must be a pair ((support_x, support_y), (query_x, query_y)) of tensors with shapes"
            f" (tasks, samples, ...), got {shown}"
        )
    support, query = batch
    return support, query


def unpacked_for_prediction(batch: object) -> tuple[Samples, Tensor]:
    """The support and the query inputs; query targets, if any, are ignored."""
    support, query = unpacked(batch)
    inputs: object = query[0] if isinstance(query, Sequence) and len(query) == 2 else query
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "`batch` must be ((support_x, support_y), query_x) for prediction, with or without `query_y` beside"
            f" `query_x`, got {type(query).__name__} for the second part"
        )
    return support, inputs
