"""DDP around a module whose parameters were replaced, or computed from others by parametrizations."""

import torch
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins._lightning import DDPStrategy, LightningModule, Trainer

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def wrap_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = pl_module
        strategy.configure_ddp()


def rewrap(trainer: Trainer, pl_module: LightningModule, ignored: tuple[str, ...]) -> None:
    """Wrap a module in DDP again: a parametrization removes the hooks through which DDP receives gradients.

    Args:
        trainer: The Trainer inside of its `fit`.
        pl_module: Its module.
        ignored: Submodules whose parameters and buffers DDP is to leave alone. Scores have no gradient as long as the
            choice has not begun, which it would take for parameters that nothing uses; they are reduced elsewhere.
    """
    own = vars(pl_module)
    before = own.get(_IGNORED)
    tensors = (*pl_module.named_parameters(), *pl_module.named_buffers())
    names = [name for name, _ in tensors if name.partition(".")[0] in ignored]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, [*(before or ()), *names])
    try:
        wrap_anew(trainer, pl_module)
    finally:
        own.pop(_IGNORED)
        if before is not None:
            own[_IGNORED] = before
    compile_anew(pl_module)  # what is compiled already does not ask for new hooks


def compile_anew(pl_module: LightningModule) -> None:
    compiled = getattr(pl_module, "_compiler_ctx", None) is not None or any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in pl_module.modules()
    )
    if compiled:
        torch.compiler.reset()
