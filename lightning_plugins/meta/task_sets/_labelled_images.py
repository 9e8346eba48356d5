"""Images with labels, from files or memory, and shared parts of their loaders."""

import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plugins.meta.task_sets.base import Split

SIZE = 84  # pixels, as in most published few-shot results
# Functions that reconstruct NumPy arrays, under old and new names.
_ARRAYS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Base class of labelled images, from which `FewShot` makes tasks.

    Attributes:
        targets: The label of every image, from 0.
        classes: The name of every label.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        targets: Iterable[int],
        classes: Iterable[str],
        transform: Callable[[Any], Any] | None,
    ) -> None:
        if find_spec("PIL") is None:
            raise ImportError("images need Pillow; run `pip install pillow`")
        self.sources, self.transform = sources, transform
        self.targets, self.classes = list(targets), list(classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = _opened(self.sources[index])
        return (_resized(image) if self.transform is None else self.transform(image)), self.targets[index]


def numbered(names: Iterable[str]) -> tuple[list[int], list[str]]:
    """The labels of images with these classes, and the classes in alphabetical order."""
    listed = list(names)
    classes = sorted(set(listed))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[name] for name in listed], classes


def of_split(names: Sequence[str], split: Split) -> list[str]:
    """Every second class for training, the others alternately for validation and test."""
    first, step = {"train": (0, 2), "val": (1, 4), "test": (3, 4)}[split]
    return list(names)[first::step]


def check_files(root: Path, files: Iterable[Path]) -> list[Path]:
    """Raise an error for missing files."""
    listed = list(files)
    missing = [file for file in listed if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"`root` must hold all images, {len(listed)}, {str(root)!r} lacks {len(missing)} of them,"
            f" such as {str(missing[0].relative_to(root))!r}"
        )
    return listed


def wrong_layout(root: Path, *layouts: str) -> FileNotFoundError:
    """Error that lists the expected and the actual contents of a folder."""
    if not root.is_dir():
        return FileNotFoundError(f"`root` must be a folder, got {str(root)!r}")
    found = sorted(path.name for path in root.iterdir())
    shown = ", ".join(map(repr, found[:6])) + (", …" if len(found) > 6 else "")
    return FileNotFoundError(f"`root` must hold {' or '.join(layouts)}, {str(root)!r} holds {shown or 'nothing'}")


def load_pickle(file: Path) -> Any:
    """Load a pickle of arrays in dictionaries and lists; others, which could run any code, raise an error."""
    with file.open("rb") as stream:
        try:
            return _ArraysOnly(stream, encoding="latin1").load()  # some were written by Python 2
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file.name!r} must be a pickle of arrays, dictionaries and lists: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could do anything")
        return super().find_class(module, name)


def _opened(source: Any) -> Any:
    """A file, an array of shape (height, width, 3), or the bytes of an image file in an array."""
    from PIL import Image

    if isinstance(source, Path):
        with Image.open(source) as image:
            return image.convert("RGB")
    if source.ndim == 3:
        return Image.fromarray(source)
    return Image.open(io.BytesIO(source.tobytes())).convert("RGB")


def _resized(image: Any) -> Tensor:
    """Shape (3, 84, 84), from 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.resize((SIZE, SIZE)).tobytes()), dtype=torch.uint8)
    return pixels.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
