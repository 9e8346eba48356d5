"""mini-ImageNet, in the two layouts in which it is distributed."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice
from lightning_plugins.meta.task_sets._labelled_images import (
    LabelledImages,
    check_files,
    load_pickle,
    numbered,
    wrong_layout,
)
from lightning_plugins.meta.task_sets.base import Split


class MiniImageNet(LabelledImages):
    """Images of mini-ImageNet: 64 classes for training, 16 for validation, 20 for test.

    Two layouts are supported: ``train.csv``, ``val.csv`` and ``test.csv`` with the columns ``filename`` and ``label``
    next to a folder ``images``; and ``mini-imagenet-cache-train.pkl`` and so on, each a pickled dictionary of
    ``image_data`` and ``class_dict``. From pickles only arrays in dictionaries and lists are loaded.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: Converts a PIL image to a tensor; by default of shape ``(3, 84, 84)`` with values from 0 to 1.

    Raises:
        FileNotFoundError: If the folder has neither layout, or images are missing.
        ValueError: If the split is unknown, or a file does not hold what it should.
        ImportError: If Pillow is missing.

    Example:
        >>> MiniImageNet("elsewhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `root` must be a folder, got 'elsewhere'

    Source:
        Vinyals et al., NeurIPS 2016, https://arxiv.org/abs/1606.04080, with the split of Ravi and Larochelle, ICLR
        2017, which is that of these files.
    """

    def __init__(
        self, root: str | Path, split: Split = "train", *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        check_arguments(MiniImageNet.__init__, locals())
        root, _ = Path(root), check_choice("split", split, get_args(Split))
        table, cache = root / f"{split}.csv", root / f"mini-imagenet-cache-{split}.pkl"
        if table.is_file():
            names, labels = _rows(table)
            super().__init__(
                check_files(root, [root / "images" / name for name in names]), *numbered(labels), transform
            )
        elif cache.is_file():
            images, labels = _cached(cache)
            super().__init__(images, *numbered(labels), transform)
        else:
            raise wrong_layout(root, f"{table.name!r} beside 'images'", repr(cache.name))


def _rows(table: Path) -> tuple[list[str], list[str]]:
    with table.open(newline="") as stream:
        rows = csv.DictReader(stream)
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table.name!r} must have the columns 'filename' and 'label', got {rows.fieldnames}")
        listed = list(rows)
    return [row["filename"] for row in listed], [row["label"] for row in listed]


def _cached(cache: Path) -> tuple[Any, list[str]]:
    content = load_pickle(cache)
    if not isinstance(content, dict) or not {"image_data", "class_dict"} <= set(content):
        got = list(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{cache.name!r} must be a dictionary of 'image_data' and 'class_dict', got {got}")
    images, members = content["image_data"], content["class_dict"]
    labels = {int(index): str(name) for name, indices in members.items() for index in indices}
    if sorted(labels) != list(range(len(images))):
        raise ValueError(
            f"'class_dict' of {cache.name!r} must have every one of the {len(images)} images, got {len(labels)}"
        )
    return images, [labels[index] for index in range(len(images))]
