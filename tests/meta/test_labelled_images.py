"""Loaders of few-shot image sets, on small files in their layouts; what is missing or wrong is named."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lightning_plugins.meta import CUB, Cars, FewShot, MiniImageNet, TieredImageNet
from lightning_plugins.meta.task_sets._labelled_images import load_pickle

ROOT = Path(__file__).parents[2]


def grey(value):
    """An image of one colour, by which the tests tell images apart."""
    return np.full((6, 5, 3), value, dtype=np.uint8)


def write_image(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(value)).save(file)


def write_pickle(file, content, protocol=2):
    file.write_bytes(pickle.dumps(content, protocol))


def contents(dataset):
    """The grey value of every image, with the name of its class."""
    assert len(dataset) == len(dataset.targets)
    found = []
    for image, label in (dataset[index] for index in range(len(dataset))):
        assert image.shape == (3, 84, 84)
        assert image.min() == image.max()
        found.append((round(float(image.max()) * 255), dataset.classes[label]))
    return found


def write_csv(root):
    (root / "train.csv").write_text("filename,label\nb1.png,n02\na1.png,n01\nb2.png,n02\n")
    for value, name in enumerate(("b1", "a1", "b2"), start=1):
        write_image(root / "images" / f"{name}.png", value)


def test_mini_imagenet_as_tables_and_files(tmp_path):
    write_csv(tmp_path)
    dataset = MiniImageNet(tmp_path)
    assert contents(dataset) == [(1, "n02"), (2, "n01"), (3, "n02")]
    assert dataset.targets == [1, 0, 1]
    assert MiniImageNet(str(tmp_path), transform=lambda image: image.size)[0] == ((5, 6), 1)


def test_rows_are_rows_and_colours_are_channels(tmp_path):
    write_csv(tmp_path)
    pixels = grey(0)
    pixels[:3] = (200, 100, 50)  # the upper half
    Image.fromarray(pixels).save(tmp_path / "images" / "b1.png")
    image, _ = MiniImageNet(tmp_path)[0]
    expected = torch.tensor([200, 100, 50]) / 255
    torch.testing.assert_close(image[:, :20], expected.view(3, 1, 1).expand(-1, 20, 84))
    assert not image[:, -20:].any()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mini_imagenet_as_a_cache(tmp_path, protocol):
    images = np.stack([grey(value) for value in (7, 8, 9)])
    content = {"image_data": images, "class_dict": {"n05": [2, 0], "n03": np.array([1])}}
    write_pickle(tmp_path / "mini-imagenet-cache-val.pkl", content, protocol)
    assert contents(MiniImageNet(tmp_path, "val")) == [(7, "n05"), (8, "n03"), (9, "n05")]


def test_tiered_imagenet(tmp_path):
    labels = {"label_specific": np.array([1, 0, 1]), "label_specific_str": ["cat", "dog"], "label_general": [0, 0, 0]}
    write_pickle(tmp_path / "test_labels.pkl", labels)
    np.savez(tmp_path / "test_images.npz", images=np.stack([grey(value) for value in (1, 2, 3)]))
    expected = [(1, "1 dog"), (2, "0 cat"), (3, "1 dog")]
    assert contents(TieredImageNet(tmp_path, "test")) == expected
    encoded = []
    for value in (4, 5, 6):
        write_image(tmp_path / "one.png", value)
        encoded.append(np.frombuffer((tmp_path / "one.png").read_bytes(), dtype=np.uint8))
    write_pickle(tmp_path / "test_images_png.pkl", encoded)
    assert contents(TieredImageNet(tmp_path, "test")) == [(value + 3, name) for value, name in expected]


def write_cub(root, classes=9):
    for number in range(1, classes + 1):
        write_image(root / "images" / f"{number:03}.Bird" / "Bird 1.png", number)
    numbers = range(1, classes + 1)
    (root / "images.txt").write_text("".join(f"{n} {n:03}.Bird/Bird 1.png\n" for n in numbers))
    (root / "image_class_labels.txt").write_text("".join(f"{n} {n}\n" for n in numbers))
    (root / "classes.txt").write_text("".join(f"{n} {n:03}.Bird\n" for n in numbers))


@pytest.mark.parametrize("folder", ["", "CUB_200_2011"])
def test_cub(tmp_path, folder):
    write_cub(tmp_path / folder)
    found = {split: [value for value, _ in contents(CUB(tmp_path, split))] for split in ("train", "val", "test")}
    assert found == {"train": [1, 3, 5, 7, 9], "val": [2, 6], "test": [4, 8]}
    assert CUB(tmp_path, "val").classes == ["002.Bird", "006.Bird"]


def structs(names, rows):
    """An array of Matlab's structures."""
    result = np.empty(len(rows), dtype=[(name, object) for name in names])
    result[:] = [tuple(row) for row in rows]
    return result


CARS = ["BMW", "Audi", "Fiat", "Volvo", "Ford", "Honda"]


def write_cars(root, number=None):
    rows = [(f"car_ims/{value}.png", number or value) for value in range(1, 7)]
    for path, _ in rows:
        write_image(root / path, int(Path(path).stem))
    names = np.array(CARS, dtype=object)
    savemat(
        root / "cars_annos.mat", {"annotations": structs(("relative_im_path", "class"), rows), "class_names": names}
    )


def write_devkit(root):
    kit = root / "devkit"
    kit.mkdir()
    savemat(kit / "cars_meta.mat", {"class_names": np.array(CARS, dtype=object)})
    files = {"cars_train": "cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"}
    for (folder, file), values in zip(files.items(), ((1, 2, 3, 4), (5, 6)), strict=True):
        rows = [(f"{value}.png", value) for value in values]
        savemat(kit / file, {"annotations": structs(("fname", "class"), rows)})
        for value in values:
            write_image(root / folder / f"{value}.png", value)


def write_folders(root):
    for value, name in enumerate(CARS, start=1):
        write_image(root / ("train" if value < 5 else "test") / name / "x.png", value)


@pytest.mark.parametrize("write", [write_cars, write_devkit, write_folders])
def test_cars(tmp_path, write):
    write(tmp_path)
    found = {split: [value for value, _ in contents(Cars(tmp_path, split))] for split in ("train", "val", "test")}
    assert found == {"train": [2, 3, 6], "val": [1, 4], "test": [5]}  # by name, not by number
    assert Cars(tmp_path, "test").classes == ["Ford"]


NAMES = [  # as the devkit has them and in its order, which is not the alphabet's; and as folders of images have them
    ("AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
    ("Acura TSX Sedan 2012", "Acura_TSX_Sedan_2012"),
    ("Acura Integra Type R 2001", "Acura Integra Type R 2001"),
    ("Ram C/V Cargo Van Minivan 2012", "Ram C-V Cargo Van Minivan 2012"),
    ("FIAT 500 Abarth 2012", "fiat 500 abarth 2012"),
    ("Fisker Karma Sedan 2012", "Fisker Karma Sedan 2012"),
    ("smart fortwo Convertible 2012", "smart fortwo Convertible 2012"),
    ("Volvo 240 Sedan 1993", "Volvo 240 Sedan 1993"),
]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cars_have_one_split_in_all_layouts(tmp_path, split, monkeypatch):
    devkit, folders, annotated = (tmp_path / name for name in ("devkit", "folders", "annotated"))
    for root in (devkit, folders, annotated):
        root.mkdir()
    monkeypatch.setitem(globals(), "CARS", [name for name, _ in NAMES[:6]])
    write_devkit(devkit)
    write_cars(annotated)
    monkeypatch.setitem(globals(), "CARS", [name for _, name in NAMES[:6]])
    write_folders(folders)
    found = [sorted(value for value, _ in contents(Cars(root, split))) for root in (devkit, annotated, folders)]
    assert found[0] == found[1] == found[2]
    assert found[0]


def test_they_are_datasets_for_few_shot_tasks(tmp_path):
    for number in (1, 3):
        for more in (2, 3):
            write_image(tmp_path / "train" / f"{number}" / f"{more}.png", 10 * number + more)
    write_image(tmp_path / "test" / "2" / "1.png", 1)
    (support_x, _), (query_x, _) = FewShot(Cars(tmp_path), 2, 1, 1).sample(1, torch.Generator().manual_seed(0))
    assert support_x.shape == query_x.shape == (1, 2, 3, 84, 84)
    values = (torch.cat([support_x, query_x]).amax((2, 3, 4)) * 255).round().flatten().tolist()
    assert sorted(values) == [12.0, 13.0, 32.0, 33.0]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    write_pickle(tmp_path / "x.pkl", {"image_data": [Harmful()]})
    with pytest.raises(
        ValueError, match=r"'x.pkl' must be a pickle of arrays, .* asks for \w+.mkdir, which could do any"
    ):
        load_pickle(tmp_path / "x.pkl")
    assert not Path("harm").exists()
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert Path("harm").exists()  # control: ordinary loading does call it


def broken_cub(root, file, text):
    write_cub(root)
    (root / file).write_text(text)


# name: (prepare the folder, load it, error, what the message says)
MISTAKES = {
    "split": (None, lambda root: CUB(root, "valid"), ValueError, "`split` must be .* did you mean 'val'"),
    "no folder": (None, lambda root: Cars(root / "no"), FileNotFoundError, "`root` must be a folder, got '.*no'"),
    "empty": (None, MiniImageNet, FileNotFoundError, "must hold 'train.csv' beside 'images' or .* holds nothing"),
    "another layout": (write_cub, TieredImageNet, FileNotFoundError, "must hold 'train_labels.pkl' .* holds 'classes"),
    "CUB without a table": (
        lambda root: [write_cub(root), (root / "classes.txt").unlink()],
        CUB,
        FileNotFoundError,
        "must hold 'images.txt' and 'image_class_labels.txt' and 'classes.txt'",
    ),
    "missing images": (
        lambda root: [write_csv(root), (root / "images" / "b2.png").unlink()],
        MiniImageNet,
        FileNotFoundError,
        "must hold all images, 3, .* lacks 1 of them, such as 'images/b2.png'",
    ),
    "csv without columns": (
        lambda root: (root / "train.csv").write_text("file;label\n"),
        MiniImageNet,
        ValueError,
        r"'train.csv' must have the columns 'filename' and 'label', got \['file;label'\]",
    ),
    "cache of another kind": (
        lambda root: write_pickle(root / "mini-imagenet-cache-train.pkl", {"data": [1]}),
        MiniImageNet,
        ValueError,
        r"must be a dictionary of 'image_data' and 'class_dict', got \['data'\]",
    ),
    "cache with images of no class": (
        lambda root: write_pickle(
            root / "mini-imagenet-cache-train.pkl", {"image_data": np.zeros((2, 4, 4, 3)), "class_dict": {"a": [1]}}
        ),
        MiniImageNet,
        ValueError,
        "must have every one of the 2 images, got 1",
    ),
    "cut off": (
        lambda root: (root / "mini-imagenet-cache-train.pkl").write_bytes(b"\x80\x04"),
        MiniImageNet,
        ValueError,
        "must be a pickle of arrays, dictionaries and lists",
    ),
    "labels of another kind": (
        lambda root: [
            write_pickle(root / "train_labels.pkl", [1, 2]),
            write_pickle(root / "train_images_png.pkl", []),
        ],
        TieredImageNet,
        ValueError,
        "'train_labels.pkl' must be a dictionary with 'label_specific', got list",
    ),
    "too few labels": (
        lambda root: [
            write_pickle(root / "train_labels.pkl", {"label_specific": [0]}),
            write_pickle(root / "train_images_png.pkl", [grey(0), grey(1)]),
        ],
        TieredImageNet,
        ValueError,
        "must have a label for each of the 2 images, got 1",
    ),
    "array of another name": (
        lambda root: [
            write_pickle(root / "train_labels.pkl", {"label_specific": [0]}),
            np.savez(root / "train_images.npz", pictures=np.zeros(1)),
        ],
        TieredImageNet,
        ValueError,
        r"'train_images.npz' must have an array 'images', got \['pictures'\]",
    ),
    "half a line": (
        lambda root: broken_cub(root, "classes.txt", "1\n"),
        CUB,
        ValueError,
        "'classes.txt' must have lines of a number and what it means, got '1'",
    ),
    "images without a label": (
        lambda root: broken_cub(root, "image_class_labels.txt", "1 1\n"),
        CUB,
        ValueError,
        "must have the same images, 9 and 1",
    ),
    "class without a name": (
        lambda root: broken_cub(root, "classes.txt", "1 a\n"),
        CUB,
        ValueError,
        r"'classes.txt' must have every class .*, it lacks \['2', '3', '4', '5', '6'\]",
    ),
    "devkit without labels": (
        lambda root: [write_devkit(root), (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()],
        Cars,
        FileNotFoundError,
        "must hold 'cars_meta.mat' and .*'cars_test_annos_withlabels.mat', .*devkit' holds 'cars_meta.mat'",
    ),
    "annotations missing": (
        lambda root: savemat(root / "cars_annos.mat", {"names": [1]}),
        Cars,
        ValueError,
        r"'cars_annos.mat' must hold 'annotations', got \['names'\]",
    ),
    "class out of range": (
        lambda root: write_cars(root, number=9),
        Cars,
        ValueError,
        "'annotations' must have classes from 1 to 6, got 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path):
    prepare, load, error, message = MISTAKES[name]
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("missing", "message"), [("scipy", "needs scipy; run `pip install scipy`"), ("PIL", "Pillow")])
def test_missing_packages_are_named(missing, message, tmp_path):
    write_cars(tmp_path)
    code = (
        "import importlib.util as u; f = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {missing!r} else f(name, *a)\n"
        "from lightning_plugins.meta import Cars\n"
        f"try: Cars({str(tmp_path)!r})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert message in done.stdout, done.stderr
