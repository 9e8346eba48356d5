"""Stanford Cars, in the layouts in which it is distributed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
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

Images = list[tuple[Path, str]]


class Cars(LabelledImages):
    """Images of cars (Stanford Cars): 98 classes for training, 49 for validation, 49 for test.

    Three layouts are supported, whose own training and test split is ignored: ``cars_annos.mat`` with the folder
    ``car_ims``; the folder ``devkit`` with ``cars_meta.mat``, ``cars_train_annos.mat`` and
    ``cars_test_annos_withlabels.mat`` next to ``cars_train`` and ``cars_test``; and image folders ``train/<class>`` and
    ``test/<class>``. With classes in alphabetical order (letters and digits only), every second one is for training,
    and the others alternately for validation and test. All layouts thus have the same split, although they number and
    spell classes differently; it differs from splits by the devkit's numbers.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: Converts a PIL image to a tensor; by default of shape ``(3, 84, 84)`` with values from 0 to 1.

    Raises:
        FileNotFoundError: If the folder has none of these layouts, or images are missing.
        ValueError: If the split is unknown, or a file does not hold what it should.
        ImportError: If Pillow, or for ``.mat`` files scipy, is missing.

    Example:
        >>> Cars("elsewhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `root` must be a folder, got 'elsewhere'

    Source:
        Krause et al., 3dRR workshop, 2013; split as for the birds of Chen et al., ICLR 2019,
        https://arxiv.org/abs/1904.04232.
    """

    def __init__(
        self, root: str | Path, split: Split = "train", *, transform: Callable[[Any], Any] | None = None
    ) -> None:
        check_arguments(Cars.__init__, locals())
        root, _ = Path(root), check_choice("split", split, get_args(Split))
        if (root / "cars_annos.mat").is_file():
            images, classes = _annotated(root)
        elif (root / "devkit").is_dir():
            images, classes = _with_devkit(root)
        elif (root / "train").is_dir() and (root / "test").is_dir():
            images, classes = _in_folders(root)
        else:
            raise wrong_layout(root, "'cars_annos.mat'", "'devkit'", "the folders 'train' and 'test'")
        chosen = set(of_split(sorted(classes, key=_letters), split))
        kept = [(file, name) for file, name in images if name in chosen]
        super().__init__(check_files(root, [file for file, _ in kept]), *numbered(name for _, name in kept), transform)


def _letters(name: str) -> str:
    """Normalised class name, equal in all layouts: folders lack the slash of 'C/V' and perhaps spaces."""
    return "".join(filter(str.isalnum, name.lower()))


def _annotated(root: Path) -> tuple[Images, list[str]]:
    content = _matlab(root / "cars_annos.mat", "annotations", "class_names")
    classes = [str(name) for name in content["class_names"]]
    rows = content["annotations"]
    return [(root / str(row.relative_im_path), _named(classes, row)) for row in rows], classes


def _with_devkit(root: Path) -> tuple[Images, list[str]]:
    kit = root / "devkit"
    parts = {"cars_train": "cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"}
    if not all((kit / file).is_file() for file in ("cars_meta.mat", *parts.values())):
        raise wrong_layout(kit, f"'cars_meta.mat' and {' and '.join(map(repr, parts.values()))}")
    classes = [str(name) for name in _matlab(kit / "cars_meta.mat", "class_names")["class_names"]]
    images = []
    for folder, file in parts.items():
        rows = _matlab(kit / file, "annotations")["annotations"]
        images += [(root / folder / str(row.fname), _named(classes, row)) for row in rows]
    return images, classes


def _in_folders(root: Path) -> tuple[Images, list[str]]:
    folders = [folder for part in ("train", "test") for folder in sorted((root / part).iterdir()) if folder.is_dir()]
    images = [(file, folder.name) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    return images, sorted({folder.name for folder in folders})


def _named(classes: list[str], row: Any) -> str:
    number = int(getattr(row, "class"))
    if not 1 <= number <= len(classes):
        raise ValueError(f"'annotations' must have classes from 1 to {len(classes)}, got {number}")
    return classes[number - 1]


def _matlab(file: Path, *names: str) -> dict[str, Any]:
    if find_spec("scipy") is None:
        raise ImportError(f"{file.name!r} needs scipy; run `pip install scipy`, or use the layout with folders")
    matlab = import_module("scipy.io")  # which comes without types
    content: dict[str, Any] = matlab.loadmat(file, squeeze_me=True, struct_as_record=False)
    if missing := [name for name in names if name not in content]:
        found = [name for name in content if not name.startswith("__")]
        raise ValueError(f"{file.name!r} must hold {missing[0]!r}, got {found}")
    return content
