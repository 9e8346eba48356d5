"""Callbacks that take turns in one training, each timed in its own steps."""

import itertools
import time
from typing import Any

import torch
from lightning.pytorch import Callback


class InTurns(Callback):
    """Assigns every step to one of several callbacks, or to none, and times whole steps from start to start."""

    def __init__(self, forms: dict[str, Callback | None], device: str) -> None:
        self.forms, self.device = forms, device
        self.names = itertools.cycle(forms)
        self.name: str | None = None
        self.marks: list[tuple[str | None, Any]] = []

    def _mark(self, name: str | None) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.process_time()))

    def _all(self, hook: str, *arguments: Any) -> None:
        for callback in filter(None, self.forms.values()):
            getattr(callback, hook)(*arguments)

    def setup(self, *arguments: Any, stage: str) -> None:
        self._all("setup", *arguments, stage)

    def on_fit_start(self, *arguments: Any) -> None:
        self._all("on_fit_start", *arguments)

    def on_train_batch_start(self, *_: Any) -> None:
        self.name = next(self.names)
        self._mark(self.name)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        callback = self.forms[self.name or ""]
        if callback is not None:
            callback.on_before_optimizer_step(*arguments)

    def on_train_end(self, *_: Any) -> None:
        self._mark(None)

    def teardown(self, *arguments: Any, stage: str) -> None:
        self._all("teardown", *arguments, stage)

    def milliseconds(self, leave_out: int) -> dict[str, list[float]]:
        """Times of each form, without the first rounds."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in self.forms}
        for (name, start), (_, end) in itertools.pairwise(self.marks[leave_out * len(self.forms) :]):
            taken = start.elapsed_time(end) if self.device == "cuda" else 1e3 * (end - start)
            found[str(name)].append(taken)
        return found
