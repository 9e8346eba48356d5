"""Characters as few-shot tasks: what is drawn, what is left out, splits, and the random changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_plugins.meta import GlyphFewShot
from lightning_plugins.meta.task_sets._glyph_images import _lookalikes, glyphs

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # few, so that they are drawn quickly
ROOT = Path(__file__).parents[2]


def draw(count=1, seed=0, **arguments):
    tasks = GlyphFewShot(**{"characters": LETTERS, **arguments})
    return tasks.sample(count, torch.Generator().manual_seed(seed))


@settings(max_examples=20)
@given(ways=st.integers(2, 5), shots=st.integers(1, 3), queries=st.integers(1, 14), seed=st.integers(0, 2**40))
def test_tasks_have_n_classes_with_distinct_samples(ways, shots, queries, seed):
    arguments = {"ways": ways, "shots": shots, "queries": queries, "seed": seed}
    (support_x, support_y), (query_x, query_y) = drawn = draw(2, **arguments)
    assert support_x.shape == (2, ways * shots, 1, 28, 28)
    assert query_x.shape == (2, ways * queries, 1, 28, 28)
    assert support_y.tolist() == [[label for label in range(ways) for _ in range(shots)]] * 2
    assert query_y.tolist() == [[label for label in range(ways) for _ in range(queries)]] * 2
    x = torch.cat([support_x, query_x], dim=1)
    assert 0 <= x.min() < x.max() <= 1
    assert len(x.flatten(0, 1).unique(dim=0)) == x.shape[0] * x.shape[1]
    torch.testing.assert_close(draw(2, **arguments), drawn, rtol=0, atol=0)


def test_without_jitter_faces_come_once_before_one_comes_again():
    (x, _), _ = draw(20, ways=2, shots=12, queries=1, jitter=0.0)
    faces = dict(zip(glyphs(LETTERS).characters, glyphs(LETTERS).faces.tolist(), strict=True))
    assert min(faces.values()) >= 4
    for samples in x.unflatten(1, (2, 12)).flatten(0, 1):
        assert len(samples.unique(dim=0)) in set(faces.values())


def test_the_jitter_is_that_of_the_docstring():
    tasks = GlyphFewShot(characters=LETTERS)
    maps = tasks._changes(20000, torch.Generator().manual_seed(0)).double()
    linear, shift = maps.split([2, 1], dim=2)
    scale, angle = linear[:, :, 0].norm(dim=1), torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    slope = (linear[:, :, 0] * linear[:, :, 1]).sum(1) / scale.square()
    assert 0.199 < slope.abs().max() < 0.2001
    assert 19 < angle.abs().max().rad2deg() < 20.1
    assert 1.21 < scale.max() < 1.222
    assert 1.21 < 1 / scale.min() < 1.222
    assert 0.149 < shift.abs().max() < 0.1501
    torch.testing.assert_close(torch.linalg.det(linear), scale.square())  # a shear keeps areas


def test_lookalikes_are_one_class_in_one_split():
    latin_greek_cyrillic = "A\u0391\u0410B\u0392\u0412o\u03bf\u043e"
    found = glyphs(latin_greek_cyrillic)
    assert "".join(found.characters) == "ABo"
    pictures = {"x": {b"1": None}, "y": {b"2": None}, "z": {b"2": None, b"1": None}, "w": {b"3": None}}
    assert sorted(sorted(group) for group in _lookalikes(pictures)) == [["w"], ["x", "y", "z"]]


def test_all_characters_are_split_without_overlap():
    everything = glyphs()
    splits = [set(GlyphFewShot(split).characters) for split in ("train", "val", "test")]
    assert set.union(*splits) == set(everything.characters)
    assert sum(map(len, splits)) == len(everything.characters) > 2000
    assert [round(10 * len(split) / len(everything.characters)) for split in splits] == [6, 2, 2]
    images = everything.images.flatten(1)
    assert images.any(1).all()  # none is blank
    assert len(images.unique(dim=0)) == len(images)  # none is that of two characters, or twice that of one
    assert {" ", "\N{NO-BREAK SPACE}", "\N{MATHEMATICAL SANS-SERIF CAPITAL A}"}.isdisjoint(everything.characters)
    assert set(GlyphFewShot(characters=LETTERS).characters) <= splits[0]


MISTAKES = {
    "split": (
        {"split": "valid"},
        ValueError,
        "`split` must be 'train', 'val' or 'test', got 'valid'; did you mean 'val'",
    ),
    "ways": ({"ways": 1}, ValueError, "`ways` must be at least 2, got 1"),
    "too many": ({"ways": 80}, ValueError, r"number of characters of the split 'train', \d+, got 80; give more `char"),
    "none": ({"characters": "\n "}, ValueError, "of the split 'train', 0, got 5"),
    "list": ({"characters": ["a", "b"]}, TypeError, "`characters` must be a string, got list; join them"),
    "shots": ({"shots": 0}, ValueError, "`shots` must be at least 1"),
    "queries": ({"queries": "15"}, TypeError, "`queries` must be an int of at least 1, got '15'"),
    "jitter": ({"jitter": float("nan")}, ValueError, "`jitter` must be finite, got nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        GlyphFewShot(**{"characters": LETTERS, **arguments})


def test_missing_matplotlib_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else f(name, *a)\n"
        "from lightning_plugins.meta import GlyphFewShot\n"
        "try: GlyphFewShot()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "`GlyphFewShot` needs matplotlib's fonts; run `pip install 'lightning-plugins[plots]'`" in done.stdout
