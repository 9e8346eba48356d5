"""Check that no step synchronises the device: `torch.cuda.set_sync_debug_mode("error")` during batches.

On a CPU, operations that would synchronise are detected instead: those that read a value, and decompositions.
"""

import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.networks import CALLBACKS, batches, fit, names_for, wide
from gpu_parts.recorder import Recorder

PART = "syncs"
STEPS, WARM_UP = 9, 4
WAITING = ("_local_scalar_dense", "nonzero", "equal", "_linalg_eigh", "_linalg_svd", "linalg_eigh", "linalg_svd")
# The others do checks on a CPU, where they are free, that they skip on a GPU: there all of them must pass.
ON_CPU = (None, "vne", "vne, queue", "representation monitor", "spectrum monitor")
# The channels to keep are selected on the host, once per update.
BY_DESIGN = ("masks by magnitude",)
PACKAGE = "lightning_plugins"


class Reads(TorchDispatchMode):
    """Records operations that read values."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found.append(f"{name} in {place()}")
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The innermost active line of the package, and its callers."""
    frames = [frame for frame in traceback.extract_stack() if f"/{PACKAGE}/" in frame.filename]
    if not frames:
        frames = [frame for frame in traceback.extract_stack() if "lightning" in frame.filename][-1:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1][:3]) or "the backward"


class Watch:
    """Watch for synchronisations between `begin` and `end`.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        mode: On a GPU: ``"error"`` raises at the first synchronising operation, ``"warn"`` records them all.
    """

    def __init__(self, device: str, mode: str) -> None:
        self.device, self.mode, self.found, self.steps = device, mode, list[str](), 0
        self.stack = ExitStack()

    def begin(self) -> None:
        self.steps += 1
        if self.device == "cpu":
            self.stack.enter_context(Reads(self.found))
            return
        if self.mode == "warn":
            self.stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode(self.mode)
        self.stack.callback(torch.cuda.set_sync_debug_mode, "default")

    def end(self) -> None:
        self.stack.close()

    def _note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            self.found.append(place())


class Opens(Callback):
    """The first callback."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP:
            self.watch.begin()

    def on_exception(self, *_: Any) -> None:
        self.watch.end()  # before the others finish, which may synchronise


class Closes(Callback):
    """The last callback."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *_: Any) -> None:
        self.watch.end()


def watched(name: str | None, device: str, mode: str, **settings: Any) -> Watch:
    """Train with a callback, or without any, while watching."""
    watch = Watch(device, mode)
    callbacks = [] if name is None else [CALLBACKS[name]()]
    optimizer = settings.pop("optimizer", "sgd")
    fit(wide(optimizer), batches(STEPS), [Opens(watch), *callbacks, Closes(watch)], device, **settings)
    if watch.steps != STEPS - WARM_UP:
        raise RuntimeError(f"{watch.steps} steps were watched instead of {STEPS - WARM_UP}")
    return watch


def check(name: str | None, device: str, data: dict[str, Any], **settings: Any) -> None:
    """Raise an error for synchronisations; they are listed in ``data``."""
    try:
        watch = watched(name, device, "error", **settings)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        watch = watched(name, device, "warn", **settings)
    data["steps"] = watch.steps
    data["waits"] = {line: watch.found.count(line) for line in dict.fromkeys(watch.found)}
    if watch.found and name not in BY_DESIGN and (device != "cpu" or name in ON_CPU):
        raise RuntimeError(f"{len(watch.found)} waits in {watch.steps} steps: {list(data['waits'])[:3]}")


def run(recorder: Recorder) -> None:
    kinds: dict[str, dict[str, Any]] = {"32-true": {}}
    if recorder.on_gpu:
        kinds["bf16-mixed"] = {"precision": "bf16-mixed", "optimizer": "fused adamw"}
        kinds["16-mixed"] = {"precision": "16-mixed", "optimizer": "fused adamw"}
    for kind, settings in kinds.items():
        for name in (None, *names_for(recorder.tiny)):
            with recorder.item(PART, f"{kind}: {name or 'no callback'}") as data:
                recorder.require_time()
                check(name, recorder.device, data, **settings)
