"""One wrapper around a module's ``training_step``, shared by all callbacks that look at activations.

No hook of Lightning's can hand back another loss: what ``on_before_backward`` adds in place is too strong under
gradient accumulation, too weak under an fp16 scaler, absent from the logged loss, and unseen by DDP's search for unused
parameters. A term that is part of what ``training_step`` returns is right in all of these.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from lightning_plugins._lightning import LightningModule


class StepListener(Protocol):
    """What a callback offers in order to take part in the training step."""

    method: str  # what its penalties are logged under

    def recording(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """The context that the module's own step runs in."""

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        """A scalar to add to the loss, or None; called right after the step, inside the strategy's wrapper."""


class WrappedStep:
    """The wrapper of one module's ``training_step`` and the callbacks that take part in it."""

    def __init__(self, pl_module: LightningModule) -> None:
        self.listeners: list[StepListener] = []
        self._pl_module = pl_module
        self._own_entry = vars(pl_module).get("training_step")  # a compiled module has one
        self._step: Callable[..., Any] = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:  # a plain function: Lightning looks at its code
            return self._run(*args, **kwargs)

        # Lightning reads the step's signature (does it take `batch_idx`, `dataloader_iter`?) behind `__wrapped__`.
        vars(training_step).update(__wrapped__=getattr(self._step, "__wrapped__", self._step), wrapped_step=self)
        self.training_step = training_step

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self._pl_module.trainer.training:  # a validation_step may call training_step: no penalty there
            return self._step(*args, **kwargs)
        with ExitStack() as contexts:
            for listener in self.listeners:
                contexts.enter_context(listener.recording(self._pl_module))
            output = self._step(*args, **kwargs)
        if output is None:  # the user skips this batch
            return None
        penalties: dict[str, Tensor] = {}
        for listener in self.listeners:
            penalty = listener.penalty(self._pl_module)
            if penalty is not None:
                output = _add_to_loss(output, penalty)
                penalties[listener.method] = penalties.get(listener.method, 0) + penalty.detach()
        for method, total in penalties.items():  # several callbacks of one method log their sum
            self._pl_module.log(f"{method}/penalty", total)
        return output

    def leave(self, listener: StepListener) -> None:
        """End the listener's part; the last one takes the wrapper off."""
        if listener in self.listeners:
            self.listeners.remove(listener)
        if self.listeners or vars(self._pl_module).get("training_step") is not self.training_step:
            return  # someone wrapped the step after us: without listeners we only pass it on
        del self._pl_module.training_step
        if self._own_entry is not None:
            self._pl_module.training_step = self._own_entry  # type: ignore[method-assign]  # as it stood before


def join_training_step(pl_module: LightningModule, listener: StepListener) -> WrappedStep:
    """Let ``listener`` take part in the module's training steps; the first one puts the wrapper on."""
    step: WrappedStep | None = getattr(vars(pl_module).get("training_step"), "wrapped_step", None)
    if step is None:
        step = WrappedStep(pl_module)
        pl_module.training_step = step.training_step  # type: ignore[method-assign]  # this is the mechanism
        if _is_compiled(pl_module):
            torch.compiler.reset()  # graphs traced in an earlier fit would go past hooks registered since
    step.listeners.append(listener)
    return step


def _add_to_loss(output: Any, penalty: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + penalty
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + penalty}
    return output  # no loss in it: Lightning's own message names what it wants


def _is_compiled(pl_module: LightningModule) -> bool:
    def compiled(module: nn.Module) -> bool:
        return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None

    return pl_module._compiler_ctx is not None or any(map(compiled, pl_module.modules()))
