"""Images of characters, rendered once per process with the fonts shipped with matplotlib."""

import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZE = 32  # pixels of a picture
_FACES = tuple(
    f"DejaVu{family}{style}.ttf"
    for family, slanted in (("Sans", "Oblique"), ("Serif", "Italic"), ("SansMono", "Oblique"))
    for style in ("-Bold", f"-Bold{slanted}", f"-{slanted}", "")
)
_POINTS = 24  # font size: only a few wide letters do not fit into the image
_LEAST, _LEAST_DIFFERENT = 8, 4  # minimum number of faces of a character, from two families; and of distinct shapes


class Glyphs(NamedTuple):
    """Visually distinct characters in their font faces.

    Attributes:
        characters: One of every kind.
        images: Ink from 0 to 255 in every distinct face: shape ``(all faces, 32, 32)``, uint8.
        first: Index of each character's first image: shape ``(characters,)``.
        faces: Number of images of each character: shape ``(characters,)``.
    """

    characters: tuple[str, ...]
    images: Tensor
    first: Tensor
    faces: Tensor


@cache
def glyphs(wanted: str | None = None) -> Glyphs:
    """Render all characters with enough faces.

    Of characters that share an image, such as A and the Greek alpha, all but one are dropped: they are visually one
    class, and must not be on both sides of a split or be two classes of a task.

    Args:
        wanted: The characters to render; None for all.

    Returns:
        The characters in the order of their codes, and their images.
    """
    drawn = _drawn(wanted)
    kept = sorted(_of_most_faces(group, drawn) for group in _lookalikes(drawn))
    chosen = {character: list(drawn[character]) for character in kept if len(drawn[character]) >= _LEAST_DIFFERENT}
    faces = torch.tensor([len(pictures) for pictures in chosen.values()], dtype=torch.long)
    flat = bytearray(b"".join(picture for pictures in chosen.values() for picture in pictures))
    images = torch.frombuffer(flat, dtype=torch.uint8).view(-1, SIZE, SIZE) if flat else torch.empty(0, SIZE, SIZE)
    return Glyphs(tuple(chosen), images, faces.cumsum(0) - faces, faces)


def _drawn(wanted: str | None) -> dict[str, dict[bytes, None]]:
    """The distinct images of every character with enough faces."""
    fonts = _fonts()
    charmaps = [font.get_charmap() for font in fonts]
    counts: dict[int, int] = {}
    for code, glyph in (item for charmap in charmaps for item in charmap.items()):
        counts[code] = counts.get(code, 0) + (glyph != 0)  # 0 is the box for missing glyphs
    codes = [code for code, count in counts.items() if count >= _LEAST and _is_character(chr(code), wanted)]
    drawn: dict[str, dict[bytes, None]] = {}
    for font, charmap in zip(fonts, charmaps, strict=True):
        for code in codes:
            if charmap.get(code) and (picture := _picture(font, chr(code))):
                drawn.setdefault(chr(code), {})[picture] = None
    return drawn


def _is_character(character: str, wanted: str | None) -> bool:
    """Letters, numbers, punctuation and symbols, without styled variants such as a mathematical bold A."""
    styled = unicodedata.decomposition(character).startswith("<font>")
    return unicodedata.category(character)[0] in "LNPS" and not styled and (wanted is None or character in wanted)


def _fonts() -> list[Any]:
    if find_spec("matplotlib") is None:
        raise ImportError("`GlyphFewShot` needs matplotlib's fonts; run `pip install 'lightning-plugins[plots]'`")
    import matplotlib
    from matplotlib.ft2font import FT2Font

    fonts = [FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", face))) for face in _FACES]
    for font in fonts:
        font.set_size(_POINTS, 72)
    return fonts


def _picture(font: Any, character: str) -> bytes | None:
    """The centred image of a character, as bytes for comparison; None if blank or too wide."""
    from matplotlib import ft2font

    constants: Any = getattr(ft2font, "LoadFlags", ft2font)
    flags = getattr(constants, "NO_HINTING", None) or constants.LOAD_NO_HINTING  # the name before matplotlib 3.10
    font.set_text(character, flags=flags)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = torch.from_numpy(font.get_image().copy())
    rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    if max(height, width) > SIZE:
        return None
    picture = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    picture[top : top + height, left : left + width] = ink
    return picture.numpy().tobytes()


def _lookalikes(drawn: dict[str, dict[bytes, None]]) -> Iterable[list[str]]:
    """Groups of characters that share images, directly or transitively."""
    group_of: dict[bytes, list[str]] = {}
    groups: dict[int, list[str]] = {}
    for character, pictures in drawn.items():
        group = [character]
        for picture in pictures:
            other = group_of.get(picture, group)
            if other is not group:  # merge the two: all images of the other group now belong to this one
                group += other
                groups.pop(id(other))
                group_of.update({theirs: group for one in other for theirs in drawn[one]})
            group_of[picture] = group
        groups[id(group)] = group
    return groups.values()


def _of_most_faces(group: list[str], drawn: dict[str, dict[bytes, None]]) -> str:
    return max(group, key=lambda character: (len(drawn[character]), -ord(character)))
