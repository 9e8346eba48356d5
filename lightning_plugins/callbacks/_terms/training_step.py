"""One wrapper around a module's ``training_step``, shared by all callbacks that look at activations.

No hook of Lightning's can hand back another loss: what ``on_before_backward`` adds in place is too strong under
gradient accumulation, too weak under an fp16 scaler, absent from the logged loss, and unseen by DDP's search for unused
parameters. A term that is part of what ``training_step`` returns is right in all of these.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_plugins._lightning import LightningModule, is_param_in_hook_signature
from lightning_plugins.callbacks._rows.compiled import is_compiled
from lightning_plugins.callbacks._terms.logged import log_sum


class StepListener(Protocol):
    """Interface through which a callback takes part in the training step."""

    method: str  # the name its penalties are logged under

    def recording(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """The context that the module's own step runs in."""

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        """A scalar to add to the loss, or None; called right after the step, inside the strategy's wrapper."""


@runtime_checkable
class ExchangingListener(Protocol):
    """A listener whose `StepListener.penalty` waits for other processes."""

    def abandon(self, pl_module: LightningModule) -> bool:
        """Tell the other processes that the step failed here; return whether they wait for it in this step."""


class WrappedStep:
    """The wrapper of one module's ``training_step`` and the callbacks that take part in it.

    It is an attribute of the module; a copy or pickle of the module gets its own ``training_step`` there instead.

    Attributes:
        batch: What the step under way was called with; None where it fetches its batch itself.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self.listeners: list[StepListener] = []
        self.batch: Any = None
        self._pl_module = pl_module
        self._own_entry = vars(pl_module).get("training_step")  # a compiled module has one
        self._step: Callable[..., Any] = pl_module.training_step
        # Lightning reads the step's signature (does it take `batch_idx`, `dataloader_iter`?) behind `__wrapped__`.
        self.__wrapped__ = getattr(self._step, "__wrapped__", self._step)
        self._fetches = is_param_in_hook_signature(self._step, "dataloader_iter", explicit=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._pl_module.trainer.training:  # a validation_step may call training_step: no penalty there
            return self._step(*args, **kwargs)
        if not self._fetches:
            self.batch = args[0] if args else next(iter(kwargs.values()), None)
        try:
            return self._run(*args, **kwargs)
        finally:
            self.batch = None

    @property
    def __code__(self) -> Any:
        """The code of the module's own step, at which Lightning looks where the wrapper itself was wrapped."""
        return self.__wrapped__.__code__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self._pl_module).training_step, memo.get(id(self._pl_module), self._pl_module))

    def __reduce__(self) -> Any:
        return getattr, (self._pl_module, "training_step")  # of the module in the pickle, which has no wrapper then

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as contexts:
            for listener in self.listeners:
                contexts.enter_context(listener.recording(self._pl_module))
            try:
                output = self._step(*args, **kwargs)
            except Exception:
                self._abandon()
                raise
        if output is None:  # the user skips this batch, which Lightning refuses on several ranks
            self._abandon()
            return None
        penalties: dict[str, Tensor] = {}
        for listener in self.listeners:
            penalty = listener.penalty(self._pl_module)
            if penalty is not None:
                output = _add_to_loss(output, penalty)
                penalties[listener.method] = penalties.get(listener.method, 0) + penalty.detach()
        for method, total in penalties.items():  # several callbacks of one method log their sum
            log_sum(self._pl_module, f"{method}/penalty", total)
        return output

    def _abandon(self) -> None:
        """Release waiting processes: the first listener they wait for makes them all raise an error."""
        exchanging = (listener for listener in self.listeners if isinstance(listener, ExchangingListener))
        any(listener.abandon(self._pl_module) for listener in exchanging)

    def leave(self, listener: StepListener) -> None:
        """End the listener's part; the last one takes the wrapper off."""
        if listener in self.listeners:
            self.listeners.remove(listener)
        if self.listeners or vars(self._pl_module).get("training_step") is not self:
            return  # someone wrapped the step after us: without listeners we only pass it on
        del self._pl_module.training_step
        if self._own_entry is not None:
            self._pl_module.training_step = self._own_entry


def join_training_step(pl_module: LightningModule, listener: StepListener) -> WrappedStep:
    """Let ``listener`` take part in the module's training steps; the first one puts the wrapper on."""
    step = vars(pl_module).get("training_step")
    if not isinstance(step, WrappedStep):
        step = WrappedStep(pl_module)
        vars(pl_module)["training_step"] = step
        if is_compiled(pl_module):
            torch.compiler.reset()  # graphs traced in an earlier fit would go past hooks registered since
    step.listeners.append(listener)
    return step


def _add_to_loss(output: Any, penalty: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + penalty
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + penalty}
    return output  # no loss in it: Lightning's own message explains the requirement
