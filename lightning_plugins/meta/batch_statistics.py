"""Norms with running statistics, which an inner loop cannot update in training mode."""

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_plugins._arguments import check_arguments

Model = TypeVar("Model", bound=nn.Module)


def use_batch_statistics(model: Model) -> Model:
    """Make batch norms always use the statistics of the current batch, and drop their running statistics.

    For an inner loop this is the transductive setting of most published few-shot results: the samples of a task's query
    batch share statistics, in evaluation too.

    Args:
        model: The model, changed in place: the running statistics are also removed from its state dict.

    Returns:
        ``model``.

    Example:
        >>> norm = use_batch_statistics(nn.Sequential(nn.BatchNorm2d(4)))[0]
        >>> norm.running_mean is None, sorted(norm.state_dict())
        (True, ['bias', 'weight'])
    """
    check_arguments(use_batch_statistics, locals())
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def check_no_running_statistics(model: nn.Module) -> None:
    """Raise an error for norms that would update running statistics: ``vmap`` and ``grad`` cannot modify buffers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"`model`: {name!r} (SyncBatchNorm) would mix the samples of different tasks on different ranks; leave"
                " out `sync_batchnorm=True`: a task's own statistics are all on one rank"
            )
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            raise ValueError(
                f"`model`: {name!r} ({type(module).__name__}) would update running statistics with every task and inner"
                " step; call `use_batch_statistics(model)` to have none, `use_per_step_statistics(model, steps)` for"
                " some of every step, or its `eval()` to normalise by those it has"
            )
