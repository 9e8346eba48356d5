"""Few-shot classification of characters, with images that need no download."""

import zlib
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins.meta.task_sets._glyph_images import glyphs
from lightning_plugins.meta.task_sets.base import Batch, Split, TaskSet, check_draw, check_ways

PIXELS = 28
_BOUNDS = {"train": (0.0, 0.64), "val": (0.64, 0.8), "test": (0.8, 1.0)}
_ROTATION, _SCALE, _SHEAR, _SHIFT = 0.35, 0.2, 0.2, 0.15  # radians, logarithm, slope, and half widths of the picture


class GlyphFewShot(TaskSet):
    """Classification of characters of many scripts: N-way K-shot tasks of 28 x 28 grey images.

    The classes are letters, digits and symbols, the samples their shapes in four to twelve faces of the fonts shipped
    with matplotlib (DejaVu), rotated, scaled, sheared and shifted at random. Within a task a class uses every face once
    before repeating one. Of characters that share an image, such as the Latin A and the Greek alpha, one is kept.
    Training, validation and test have different characters, about 64, 16 and 20 of 100, chosen by a hash of their code.
    All are rendered once per process, which takes a few seconds.

    Args:
        split: Which characters: ``"train"``, ``"val"`` or ``"test"``.
        ways: Number of classes in a task.
        shots: Number of support samples of each class.
        queries: Number of query samples of each class.
        jitter: Strength of the random distortions: at 1 up to 20 degrees, 22 % in size, a slope of 0.2, and 2 pixels;
            at 0 none.
        characters: The characters to draw from; None for all.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, the split unknown, or it has fewer than ``ways`` characters.
        ImportError: If matplotlib is missing.

    Example:
        >>> tasks = GlyphFewShot("test", ways=3, shots=1, queries=2, characters="0123456789abcdefghij")
        >>> support, query = tasks.sample(4, torch.Generator().manual_seed(0))
        >>> support[0].shape, query[0].shape
        (torch.Size([4, 3, 1, 28, 28]), torch.Size([4, 6, 1, 28, 28]))
        >>> tasks.characters  # of these, the split's
        ('2', '6', 'c', 'g')
    """

    def __init__(
        self,
        split: Split = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        *,
        jitter: float = 1.0,
        characters: str | None = None,
    ) -> None:
        low, high = _BOUNDS[check_choice("split", split, get_args(Split))]
        self.ways = check_ways(ways)
        self.shots = check_positive_int("shots", shots)
        self.queries = check_positive_int("queries", queries)
        self.jitter = check_finite_number("jitter", jitter)
        if characters is not None and not isinstance(characters, str):
            raise TypeError(f"`characters` must be a string, got {type(characters).__name__}; join them")
        everything = glyphs(characters)
        kept = [low <= _hash(character) < high for character in everything.characters]
        self.characters = tuple(
            character for character, is_in in zip(everything.characters, kept, strict=True) if is_in
        )
        if len(self.characters) < ways:
            raise ValueError(
                f"`ways` must be at most the number of characters of the split {split!r}, {len(self.characters)},"
                f" got {ways}" + ("" if characters is None else "; give more `characters`")
            )
        self._images, self._first, self._faces = everything.images, everything.first[kept], everything.faces[kept]

    def sample(self, tasks: int, generator: Generator) -> Batch:
        """Draw tasks; their images are distorted all at once.

        Args:
            tasks: How many.
            generator: The random generator.

        Returns:
            ``((support_x, support_y), (query_x, query_y))``, of shapes ``(tasks, ways * shots, 1, 28, 28)`` and
            ``(tasks, ways * queries, 1, 28, 28)`` with ink from 0 to 1; samples are ordered by class.
        """
        check_draw(tasks, generator)
        chosen = torch.stack([self._draw(generator) for _ in range(tasks)])
        images = self._images[chosen.flatten()].unsqueeze(1) / 255
        grid = F.affine_grid(
            self._changes(len(images), generator), [len(images), 1, PIXELS, PIXELS], align_corners=False
        )
        x = F.grid_sample(images, grid, align_corners=False).view(*chosen.shape, 1, PIXELS, PIXELS)
        y = torch.arange(self.ways).view(1, -1, 1).expand(chosen.shape)
        (support_x, query_x), (support_y, query_y) = (
            [part.flatten(1, 2) for part in whole.split([self.shots, self.queries], dim=2)] for whole in (x, y)
        )
        return (support_x, support_y), (query_x, query_y)

    def _draw(self, generator: Generator) -> Tensor:
        """Indices of a task's images: shape ``(ways, shots + queries)``."""
        drawn = []
        count = torch.arange(self.shots + self.queries)
        for number in torch.randperm(len(self.characters), generator=generator)[: self.ways].tolist():
            order = torch.randperm(int(self._faces[number]), generator=generator)
            drawn.append(self._first[number] + order[count % len(order)])
        return torch.stack(drawn)

    def _changes(self, count: int, generator: Generator) -> Tensor:
        """Affine maps from positions in the result to positions in the image: shape ``(count, 2, 3)``."""
        chance = self.jitter * (2 * torch.rand(5, count, generator=generator) - 1)
        angle, scale, shear = _ROTATION * chance[0], (_SCALE * chance[1]).exp(), _SHEAR * chance[2]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        rows = [cos, shear * cos - sin, _SHIFT * chance[3], sin, shear * sin + cos, _SHIFT * chance[4]]
        return torch.stack(rows, dim=1).view(count, 2, 3)


def _hash(character: str) -> float:
    """Hash of a character to [0, 1), independent of the other characters."""
    return float(zlib.crc32(ord(character).to_bytes(4, "big")) / 2**32)
