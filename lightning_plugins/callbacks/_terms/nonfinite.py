"""Keep a term that is NaN or infinite out of the loss, without asking the device for its value."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._lightning import LightningModule, Trainer, rank_zero_warn
from lightning_plugins.callbacks._terms.logged import log_value
from lightning_plugins.callbacks._trainer.progress import steps_done
from lightning_plugins.distributed import is_distributed
from lightning_plugins.functional.spectrum import widened


class _ZeroUndefinedGradient(torch.autograd.Function):
    """The identity; in the backward, entries that are NaN or infinite become zero.

    A term that was left out has the gradient zero, but zero times a NaN inside the term's own backward is NaN.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.nan_to_num(grads[0], nan=0.0, posinf=0.0, neginf=0.0)


class NonfiniteGuard:
    """Skips (and counts) or raises on values that are not finite.

    Args:
        method: Name of the method, for the message.
        on_nonfinite: ``"skip"`` or ``"raise"``.
    """

    def __init__(self, method: str, on_nonfinite: str) -> None:
        self._method = method
        self._on_nonfinite = on_nonfinite
        self._skipped: Tensor | int = 0  # a tensor on the device while training: adding to it does not synchronise
        self._warned = False
        self._entered: Tensor | None = None  # names for messages

    def enter(self, embeddings: Tensor) -> Tensor:
        """Pass embeddings into the term, in float32 at least, with a gradient free of undefined entries.

        The cast comes first: an overflow in the half-precision gradient behind it is what an fp16 scaler looks for.

        Returns:
            The embeddings, for the term to be computed from.
        """
        if self._on_nonfinite == "raise":
            self._entered = embeddings.detach()
        return cast(Tensor, _ZeroUndefinedGradient.apply(widened(embeddings)))

    def leave(self, value: Tensor, label: str) -> Tensor:
        """Let a term's value out.

        Returns:
            The value, or zero (without a gradient) in place of one that is not finite.

        Raises:
            FloatingPointError: If the value is not finite and the guard is set to raise.
        """
        return self.leave_all(value[None], [label])[0]

    def leave_all(self, values: Tensor, labels: Sequence[str]) -> Tensor:
        """Let the values of several terms out, at no more cost than those of one.

        Args:
            values: The values, shape ``(n,)``.
            labels: The layer of each.

        Returns:
            The values, or zeros (without a gradient) in place of those that are not finite.

        Raises:
            FloatingPointError: If a value is not finite and the guard is set to raise.
        """
        finite = torch.isfinite(values.detach())
        if self._on_nonfinite == "raise":
            if not finite.all():
                at = int((~finite).nonzero()[0])
                raise FloatingPointError(
                    f"{self._method}: the term of layer {labels[at]!r} is {values[at].item()}{self._where()}; look for "
                    "NaN or Inf in its tensor, or pass `on_nonfinite='skip'`"
                )
            return values
        self._skipped = self._skipped + (~finite).sum()
        return torch.where(finite, values, 0.0)

    def _where(self) -> str:
        """Say, on each of several ranks, whether its own part was at fault."""
        if self._entered is None or not is_distributed():
            return ""
        fault = "is finite" if self._entered.isfinite().all() else "holds NaN or Inf"
        return f", and its tensor {fault} on rank {dist.get_rank()}"

    def skipped(self) -> int:
        """Return the number of values left out so far; synchronises with the device."""
        return int(self._skipped)

    def restore(self, skipped: int) -> None:
        """Go on counting from ``skipped``, and warn again."""
        self._skipped = skipped
        self._warned = False

    def warn_once(self) -> int:
        """Warn if anything was ever left out, the first time only; synchronises with the device."""
        skipped = self.skipped()
        if skipped and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._method}: {skipped} term(s) were NaN or infinite and left out of the loss so far; the log "
                f"counts them as `{self._method}/skipped`. Pass `on_nonfinite='raise'` to stop at the first one."
            )
        return skipped

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn and log the count after a batch, when the loggers look at the device anyway."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector of the Trainer sets it
        if every and steps_done(trainer) % every == 0:
            skipped = self.warn_once()
            if skipped:
                log_value(pl_module, f"{self._method}/skipped", float(skipped))
