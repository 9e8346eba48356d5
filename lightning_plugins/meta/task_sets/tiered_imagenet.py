"""tiered-ImageNet, in the form in which its authors published it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice
from lightning_plugins.meta.task_sets._labelled_images import LabelledImages, load_pickle, numbered, wrong_layout
from lightning_plugins.meta.task_sets.base import Split


class TieredImageNet(LabelledImages):
    """Images of tiered-ImageNet: 351 classes for training, 97 for validation, 160 for test, of different categories.

    Reads ``train_labels.pkl`` and so on with ``train_images_png.pkl``, a list of encoded images, or
    ``train_images.npz``, an array ``images``. All images are kept in memory: the 448,695 training images take 12 GB
    decoded, so the encoded ones are preferred. From pickles only arrays in dictionaries and lists are loaded.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: Converts a PIL image to a tensor; by default of shape ``(3, 84, 84)`` with values from 0 to 1.

    Raises:
        FileNotFoundError: If the folder does not have this layout.
        ValueError: If the split is unknown, or a file does not hold what it should.
        ImportError: If Pillow is missing.

    Example:
        >>> TieredImageNet("elsewhere", "valid")
        Traceback (most recent call last):
            ...
        ValueError: `split` must be 'train', 'val' or 'test', got 'valid'; did you mean 'val'?

    Source:
        Ren et al., ICLR 2018, https://arxiv.org/abs/1803.00676.
    """

    def __init__(
        self, root: str | Path, split: Split = "train", *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        check_arguments(TieredImageNet.__init__, locals())
        root, _ = Path(root), check_choice("split", split, get_args(Split))
        labels, encoded, decoded = (root / f"{split}_{name}" for name in ("labels.pkl", "images_png.pkl", "images.npz"))
        if not labels.is_file() or not (encoded.is_file() or decoded.is_file()):
            raise wrong_layout(root, f"{labels.name!r} beside {encoded.name!r} or {decoded.name!r}")
        images = load_pickle(encoded) if encoded.is_file() else _array(decoded)
        names = _names(labels)
        if len(names) != len(images):
            raise ValueError(
                f"{labels.name!r} must have a label for each of the {len(images)} images, got {len(names)}"
            )
        super().__init__(images, *numbered(names), transform)


def _array(file: Path) -> Any:
    import numpy as np

    with np.load(file, allow_pickle=False) as content:
        if "images" not in content:
            raise ValueError(f"{file.name!r} must have an array 'images', got {content.files}")
        return content["images"]


def _names(file: Path) -> list[str]:
    content = load_pickle(file)
    if not isinstance(content, dict) or "label_specific" not in content:
        got = list(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file.name!r} must be a dictionary with 'label_specific', got {got}")
    numbers = [int(number) for number in content["label_specific"]]
    names = list(map(str, content.get("label_specific_str", [])))
    width = len(str(max(numbers, default=0)))  # numeric prefix, so that the labels keep their order
    return [f"{number:0{width}} {names[number]}" if number < len(names) else f"{number:0{width}}" for number in numbers]
