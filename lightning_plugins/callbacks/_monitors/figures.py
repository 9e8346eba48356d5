"""Figures that callbacks draw: when there is time for it, and how they reach the loggers."""

import io
import re
import time
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

import fsspec  # type: ignore[import-untyped]  # it carries no types; a dependency of lightning

from lightning_plugins._lightning import (
    CometLogger,
    MLFlowLogger,
    TensorBoardLogger,
    Trainer,
    WandbLogger,
    rank_zero_warn,
)
from lightning_plugins.callbacks._trainer.progress import steps_done
from lightning_plugins.plots.style import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WARNED: "weakref.WeakSet[Trainer]" = weakref.WeakSet()
_SHARE = 0.05  # of the time that has passed; the last figures are drawn whatever they cost
Key = TypeVar("Key", bound=Hashable)


class PendingFigures(Generic[Key]):
    """Figures that have changed since they were drawn; drawing takes at most a twentieth of the time.

    Args:
        build: Makes the figure for a key, and its tag; None if there is nothing to draw.
    """

    def __init__(self, build: "Callable[[Key], tuple[str, Figure]] | None") -> None:
        self._build = build
        self._keys: dict[Key, None] = {}  # in the order of their first change
        self._next = 0.0

    def add(self, key: Key) -> None:
        """Mark the figure of ``key`` as outdated."""
        self._keys[key] = None

    def draw_if_time(self, trainer: Trainer) -> None:
        """Draw if the share of time spent drawing stays small."""
        if time.monotonic() >= self._next:
            self.draw(trainer)

    def draw(self, trainer: Trainer) -> None:
        """Draw new data on rank zero, and pass the figures to the loggers."""
        started = time.monotonic()
        if self._build is not None and trainer.is_global_zero:
            for key in self._keys:
                hand_to_loggers(trainer, *self._build(key))
        self._keys.clear()
        ended = time.monotonic()
        self._next = ended + (ended - started) / _SHARE


def check_figures(figures: bool) -> bool:
    """Return ``figures``.

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(figures, bool):
        raise TypeError(f"`figures` must be True or False, got {figures!r} ({type(figures).__name__})")
    return figures


def require_figures(figures: bool) -> bool:
    """Return ``figures``, for a callback that has little to do without them.

    Raises:
        TypeError: If it is not a bool.
        ImportError: If it is True and matplotlib is missing.
    """
    if check_figures(figures):
        require_matplotlib()
    return figures


def hand_to_loggers(trainer: Trainer, tag: str, figure: "Figure") -> None:
    """Show ``figure`` under ``tag``, for the current step; to be called on rank zero.

    TensorBoard, Weights & Biases and Comet get an image, an MLflow run an artifact for every step. For every other
    logger, and without any, a PNG file is written under the logger's directory or the Trainer's `default_root_dir`; a
    later figure of the same tag replaces it. Under `fast_dev_run`, which leaves no traces, nothing is done.

    Args:
        trainer: The Trainer.
        tag: Path-like name, such as ``representation/val/fc/spectrum``.
        figure: A matplotlib figure.
    """
    if getattr(trainer, "fast_dev_run", False):  # set at run time, unknown to type checkers
        return
    try:
        _hand_over(trainer, tag, figure)
    except OSError as error:  # a full disk, a folder that cannot be written: a figure must not end a training
        if trainer not in _WARNED:
            _WARNED.add(trainer)
            rank_zero_warn(f"the figure {tag!r} could not be written, and training continues without it: {error}")


def _hand_over(trainer: Trainer, tag: str, figure: "Figure") -> None:
    if not trainer.loggers:
        _write(trainer.default_root_dir, tag, figure)
    for logger in trainer.loggers:
        step = steps_done(trainer)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, global_step=step)
        elif isinstance(logger, WandbLogger):
            from PIL import Image  # comes with matplotlib

            logger.log_image(tag, [Image.open(_png(figure))], step=step)
        elif isinstance(logger, CometLogger):
            logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{_path(tag)}/{step:08d}.png")
        else:
            _write(logger.log_dir or logger.save_dir or trainer.default_root_dir, tag, figure)


def _png(figure: "Figure") -> io.BytesIO:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return buffer


def _path(tag: str) -> str:
    return re.sub(r"[^\w./-]", "_", tag)


def _write(folder: str, tag: str, figure: "Figure") -> None:
    # the folder may be on any file system that Lightning can write to
    system, place = fsspec.core.url_to_fs(f"{folder}/{_path(tag)}.png")
    system.makedirs(place.rpartition("/")[0], exist_ok=True)
    if system.isdir(place):
        raise IsADirectoryError(f"{place} is a folder")
    content = _png(figure).getbuffer()
    part = f"{place}.part"
    try:
        with system.open(part, "wb") as file:
            file.write(content)
        system.mv(part, place)  # a full disk leaves the old figure, not half of a new one
    except OSError:
        if system.exists(part):
            system.rm(part)
        raise
