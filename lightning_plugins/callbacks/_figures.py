"""Hand a figure to the loggers that are there."""

import io
import re
from typing import TYPE_CHECKING

import fsspec  # type: ignore[import-untyped]  # it carries no types; a dependency of lightning
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def hand_to_loggers(trainer: Trainer, tag: str, figure: "Figure") -> None:
    """Show ``figure`` under ``tag``, for the current step; to be called on rank zero.

    TensorBoard and Weights & Biases get an image. For every other logger, and without any, a PNG file is written under
    the logger's directory or the Trainer's `default_root_dir`; a later figure of the same tag replaces it. Under
    `fast_dev_run`, which leaves no traces, nothing is done.

    Args:
        trainer: The Trainer.
        tag: Path-like name, such as ``representation/val/fc/spectrum``.
        figure: A matplotlib figure.
    """
    if getattr(trainer, "fast_dev_run", False):  # set at run time, unknown to type checkers
        return
    if not trainer.loggers:
        _write(trainer.default_root_dir, tag, figure)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
        elif isinstance(logger, WandbLogger):
            from PIL import Image  # comes with matplotlib

            logger.log_image(tag, [Image.open(_png(figure))], step=trainer.global_step)
        else:
            _write(logger.log_dir or logger.save_dir or trainer.default_root_dir, tag, figure)


def _png(figure: "Figure") -> io.BytesIO:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return buffer


def _write(folder: str, tag: str, figure: "Figure") -> None:
    name = re.sub(r"[^\w./-]", "_", tag)
    # the folder may be on any file system that Lightning can write to
    system, place = fsspec.core.url_to_fs(f"{folder}/{name}.png")
    system.makedirs(place.rpartition("/")[0], exist_ok=True)
    with system.open(place, "wb") as file:
        file.write(_png(figure).getbuffer())
