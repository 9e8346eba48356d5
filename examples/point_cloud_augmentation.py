# %% [markdown]
# # Few labelled point clouds
#
# A small network finds cars in generated scenes: a spinning sensor of 16 beams over a ground with cars, pedestrians,
# walls and poles. Only a few frames have labels. It is trained without augmentation, with ground-truth sampling, with
# PolarMix and with whole-body augmentation (DR.CPO), and evaluated by average precision on unseen frames.
#
# The comparison is for one seed and no claim is made: a single run is not conclusive. `benchmarks/point_cloud.py
# precision` repeats it over seeds and fractions of labelled frames.

# %%
# %pip install --quiet 'lightning-plugins[lightning,pointcloud,plots]'

# %%
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_plugins.data import ObjectBank, RaycastScenes, SpinningSensor
from lightning_plugins.plots import point_cloud_figure
from lightning_plugins.transforms import GroundTruthSampling, PolarMix, WholeBodyAugmentation, collate_frames

STEPS = int(os.environ.get("EXAMPLE_STEPS", "300"))  # the tests set 2
SHARE = float(os.environ.get("EXAMPLE_SHARE", "0.1"))
SEED = int(os.environ.get("EXAMPLE_SEED", "0"))
METHODS = os.environ.get("EXAMPLE_METHODS", "none,ground-truth sampling,PolarMix,DR.CPO").split(",")
FRAMES, HELD_OUT = (100, 60) if STEPS > 2 else (10, 2)
SENSOR = SpinningSensor(beams=16, columns=512, lowest=-20.0, highest=2.0)
SIZE, CELL = 48, 2.0  # cells of the bird's-eye grid along each side, and their length in metres
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers


def show(figure, name):
    """Show the figure in a notebook, and write it to a file as a script."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    try:
        get_ipython  # noqa: B018 - there is one in notebooks
    except NameError:
        return
    from IPython.display import Image, display

    display(Image(path))


# %% [markdown]
# ## Frames, a bank of objects, and the augmentations
#
# All are callables on frames; the bank holds only objects of the labelled frames.

# %%
scenes = RaycastScenes(FRAMES, SENSOR, seed=1, objects={"Car": 5, "Pedestrian": 3})
held_out = [RaycastScenes(HELD_OUT, SENSOR, seed=2, objects={"Car": 5, "Pedestrian": 3})[n] for n in range(HELD_OUT)]
count = max(1, round(SHARE * FRAMES))
labelled = [scenes[(SEED * count + number) % FRAMES] for number in range(count)]  # another seed labels other frames
bank = ObjectBank.from_frames(labelled)
area = ((-45.0, 45.0), (-40.0, 40.0))
AUGMENTATIONS = {
    "none": None,
    "ground-truth sampling": GroundTruthSampling(bank, {"Car": 10}, seed=SEED),
    "PolarMix": PolarMix(labelled, seed=SEED),
    "DR.CPO": WholeBodyAugmentation(bank, {"Car": 10}, grid=SENSOR.grid, area=area, seed=SEED),
}
augmented = AUGMENTATIONS["DR.CPO"](labelled[0])
show(point_cloud_figure(labelled[0], augmented, title="A frame with inserted cars"), "point_cloud_augmentation")

# %% [markdown]
# ## A bird's-eye grid network
#
# Each cell has the number of its points, their maximum, minimum and mean height, and their mean reflectance; the
# network predicts for each cell whether it contains the centre of a car.


# %%
class Augmented(Dataset):
    def __init__(self, frames, transform, length):
        self.frames, self.transform, self.length = frames, transform, length

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        frame = {**self.frames[number % len(self.frames)], "index": number}
        return frame if self.transform is None else self.transform(frame)


def cells_of(places: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ((places[..., axis] / CELL + SIZE / 2).floor().long() for axis in (0, 1))
    inside = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
    return (x * SIZE + y).clamp(0, SIZE * SIZE - 1), inside


def grid_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    points = batch["points"]
    cells, inside = cells_of(points)
    cells = torch.where(inside & batch["mask"], cells, SIZE * SIZE)
    empty = points.new_zeros(len(points), SIZE * SIZE + 1)
    count = empty.scatter_add(1, cells, torch.ones_like(points[..., 0]))
    height = points[..., 2] + SENSOR.height
    mean = empty.scatter_add(1, cells, height) / count.clamp_min(1)
    shine = empty.scatter_add(1, cells, points[..., 3]) / count.clamp_min(1)
    top, low = (empty.scatter_reduce(1, cells, height, kind, include_self=False) for kind in ("amax", "amin"))
    image = torch.stack([count.log1p(), mean, top, low, shine], dim=1)[..., :-1].unflatten(-1, (SIZE, SIZE))
    target = torch.zeros_like(count[:, :-1])
    places, found = cells_of(batch["boxes"])
    cars = found & (batch["labels"] == bank.classes.index("Car"))
    target.scatter_reduce_(1, places, cars.to(target), "amax")
    return image, target


class GridDetector(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(5, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 1, 1)),
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image, target = grid_of(batch)
        weight = torch.tensor(20.0)  # a car in some five of 2,304 cells
        return nn.functional.binary_cross_entropy_with_logits(self.net(image).flatten(1), target, pos_weight=weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% [markdown]
# ## Average precision
#
# A detection is a cell that scores higher than its eight neighbours, correct if it is a car's cell or adjacent to one;
# each car counts once.


# %%
@torch.no_grad()
def average_precision(model: GridDetector) -> float:
    model.eval()
    scores, right, cars = [], [], 0
    for frame in held_out:
        image, target = grid_of(collate_frames([frame], bank.classes))
        score = model.net(image)[0, 0].sigmoid()
        peaks = (score == nn.functional.max_pool2d(score[None, None], 3, 1, 1)[0, 0]).nonzero()
        open_cars = target.reshape(SIZE, SIZE).nonzero().tolist()
        cars += len(open_cars)
        for x, y in sorted(peaks.tolist(), key=lambda cell: -float(score[cell[0], cell[1]])):
            near = [car for car in open_cars if max(abs(car[0] - x), abs(car[1] - y)) <= 1]
            scores.append(float(score[x, y]))
            right.append(float(bool(near)))
            if near:
                open_cars.remove(near[0])
    hits = torch.tensor(right)[torch.tensor(scores).argsort(descending=True, stable=True)]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision * hits).sum() / max(cars, 1))


results = {}
for name in METHODS:
    seed_everything(SEED, verbose=False)
    model = GridDetector()
    data = Augmented(labelled, AUGMENTATIONS[name], 4 * STEPS)
    loader = DataLoader(data, 4, collate_fn=partial(collate_frames, classes=bank.classes))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(model, loader)
    results[name] = average_precision(model)
    print(f"average precision, {name}: {results[name]:.3f}")

# %% [markdown]
# ## The check

# %%
if STEPS >= 300:
    assert all(value > 0.1 for value in results.values()), results
