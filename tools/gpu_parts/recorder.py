"""Results of a check, item by item, in a JSON file written after each item."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

PASSED, FAILED, ABSENT, LATE = "passed", "failed", "not installed", "out of time"
OPTIONAL = ("timm", "torchvision", "torch_pruning", "torch-pruning", "jsonargparse", "Captum")  # as messages name them


class OutOfTimeError(Exception):
    """The time of a part, or of the whole check, is used up."""


@dataclass
class Item:
    """One entry of the file; exceptions in its block are recorded and suppressed."""

    recorder: "Recorder"
    part: str
    name: str
    data: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> dict[str, Any]:
        self.start = time.monotonic()
        return self.data

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        status = PASSED
        if isinstance(error, ImportError) and (missing := [name for name in OPTIONAL if name in str(error)]):
            status, self.data["missing"] = ABSENT, missing[0]
        elif isinstance(error, OutOfTimeError):
            status = LATE
        elif isinstance(error, Exception):
            status = FAILED
            self.data["traceback"] = "".join(traceback.format_exception(kind, error, trace))[-6000:]
        seconds = round(time.monotonic() - self.start, 2)
        self.recorder.add(self.part, self.name, {"status": status, "seconds": seconds, **self.data})
        return error is None or isinstance(error, Exception)


@dataclass
class Recorder:
    """The file, the device, and the remaining time.

    Attributes:
        path: Path of the JSON file.
        device: ``"cpu"`` or ``"cuda"``.
        tiny: Whether to use test sizes.
        ends: End of the whole check, on the monotonic clock.
        about: Machine, versions and date.
    """

    path: Path
    device: str
    tiny: bool
    ends: float
    about: dict[str, Any]
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    part_ends: float = float("inf")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Remaining seconds of the running part."""
        return min(self.ends, self.part_ends) - time.monotonic()

    def item(self, part: str, name: str) -> Item:
        return Item(self, part, name)

    def require_time(self) -> None:
        if self.left() <= 0:
            raise OutOfTimeError

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Set the time limit of a part, in seconds."""
        self.part_ends = time.monotonic() + seconds
        yield
        self.part_ends = float("inf")

    def add(self, part: str, name: str, entry: dict[str, Any]) -> None:
        self.parts.setdefault(part, {})[name] = entry
        self.save()
        last = entry.get("traceback", "").strip().splitlines()[-1:]
        print(f"{part:10} {entry['status']:13} {entry['seconds']:7.1f} s  {name}  {''.join(last)[:160]}", flush=True)

    def save(self) -> None:
        text = json.dumps({"about": self.about, "parts": self.parts}, indent=1)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(text + "\n")
        os.replace(unfinished, self.path)

    def failures(self) -> list[str]:
        return [
            f"{part}: {name}"
            for part, items in self.parts.items()
            for name, entry in items.items()
            if entry["status"] in {FAILED, LATE}
        ]
