"""Caltech-UCSD Birds, as unpacked from its archive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice
from lightning_plugins.meta.task_sets._labelled_images import (
    LabelledImages,
    check_files,
    numbered,
    of_split,
    wrong_layout,
)
from lightning_plugins.meta.task_sets.base import Split

_TABLES = ("images.txt", "image_class_labels.txt", "classes.txt")


class CUB(LabelledImages):
    """Images of birds (CUB-200-2011): 100 classes for training, 50 for validation, 50 for test.

    Reads ``images.txt``, ``image_class_labels.txt``, ``classes.txt`` and the folder ``images``, in ``root`` or in its
    folder ``CUB_200_2011``. Every second class is for training, and the others alternately for validation and test: our
    interpretation of the usual split, whose lists are not distributed with the images.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: Converts a PIL image to a tensor; by default of shape ``(3, 84, 84)`` with values from 0 to 1.

    Raises:
        FileNotFoundError: If the folder does not have this layout, or images are missing.
        ValueError: If the split is unknown, or a file does not hold what it should.
        ImportError: If Pillow is missing.

    Example:
        >>> CUB("elsewhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `root` must be a folder, got 'elsewhere'

    Source:
        Wah et al., technical report CNS-TR-2011-001, 2011; the split of Chen et al., ICLR 2019,
        https://arxiv.org/abs/1904.04232.
    """

    def __init__(
        self, root: str | Path, split: Split = "train", *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        check_arguments(CUB.__init__, locals())
        given, _ = Path(root), check_choice("split", split, get_args(Split))
        root = given / "CUB_200_2011" if (given / "CUB_200_2011").is_dir() else given
        if not all((root / table).is_file() for table in _TABLES):
            raise wrong_layout(root, " and ".join(map(repr, _TABLES)))
        images, labels, classes = (_table(root / table) for table in _TABLES)
        if images.keys() != labels.keys():
            raise ValueError(
                f"'images.txt' and {_TABLES[1]!r} must have the same images, {len(images)} and {len(labels)}"
            )
        if unknown := set(labels.values()) - classes.keys():
            raise ValueError(f"'classes.txt' must have every class of {_TABLES[1]!r}, it lacks {sorted(unknown)[:5]}")
        chosen = set(of_split(sorted(classes, key=int), split))
        kept = [number for number in images if labels[number] in chosen]
        files = check_files(root, [root / "images" / images[number] for number in kept])
        super().__init__(files, *numbered(classes[labels[number]] for number in kept), transform)


def _table(file: Path) -> dict[str, str]:
    rows = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
    if short := [row for row in rows if len(row) != 2]:
        raise ValueError(f"{file.name!r} must have lines of a number and what it means, got {short[0][0]!r}")
    return {number: meaning.strip() for number, meaning in rows}
