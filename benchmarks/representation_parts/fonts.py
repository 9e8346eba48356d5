"""Digits of printed fonts to learn from, handwritten ones to be tested on: does the entropy of the features matter?"""

from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch import LightningModule, seed_everything
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_plugins.callbacks import VNERegularization
from representation_parts.part import Part, Run, quiet_trainer
from representation_parts.self_supervised import encoder, moved_images

STEPS, BATCH = 300, 64
SIZE, BOX = 64, 48  # pixels of a drawing, and of the larger side of its ink
# They hold symbols in the places of digits, or only a few characters.
WITHOUT_DIGITS = ("cmex10", "cmsy10", "cmmi10", "STIXNonUni", "STIXSiz", "STIXNotoMath", "DejaVuSansDisplay")
WITHOUT_DIGITS += ("DejaVuSerifDisplay", "LastResort")


def drawn(character: str, font: Path) -> Tensor:
    """One character's ink from 0 to 1, cut to its box, as 8 x 8 means."""
    figure = Figure((2, 2), dpi=SIZE)
    figure.text(0.5, 0.5, character, font=FontProperties(fname=font), fontsize=60, ha="center", va="center")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ink = 1 - np.asarray(canvas.buffer_rgba())[..., 0] / 255
    rows, columns = np.nonzero(ink.max(1) > 0.1)[0], np.nonzero(ink.max(0) > 0.1)[0]
    cut = torch.tensor(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], dtype=torch.float32)[None, None]
    scale = SIZE / max(cut.shape)
    height, width = (max(1, round(scale * side)) for side in cut.shape[2:])
    cut = F.interpolate(cut, size=(height, width), mode="bilinear", antialias=True)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    padded = F.pad(cut, (left, SIZE - width - left, top, SIZE - height - top))
    return F.avg_pool2d(padded, SIZE // 8)[0]


@cache
def printed() -> tuple[Tensor, Tensor]:
    """Ten digits in every text face of matplotlib's fonts; ink as in scikit-learn's digits, from -1 to 1."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [font for font in sorted(folder.glob("*.ttf")) if not font.name.startswith(WITHOUT_DIGITS)]
    images = torch.stack([drawn(str(digit), font) for font in fonts for digit in range(10)])
    return 2 * images - 1, torch.arange(10).repeat(len(fonts))


@cache
def handwritten() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images / 8 - 1).float()[:, None], torch.tensor(digits.target)


class Reader(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder("digits", channels=1)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(moved_images(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def run(one: Run) -> dict[str, float]:
    seed_everything(one.seed, verbose=False)
    model, dataset = Reader(), TensorDataset(*printed())
    loader = DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, num_samples=STEPS * BATCH))
    callbacks = [VNERegularization("head:input", one.knob)] if one.knob else []
    quiet_trainer(STEPS, callbacks).fit(model, loader)
    model.eval()
    accuracy = {}
    with torch.no_grad():
        for name, (images, labels) in {"printed": printed(), "handwritten": handwritten()}.items():
            accuracy[name] = 100 * float((model(images).argmax(1) == labels).float().mean())
    return accuracy


PART = Part(
    title="Printed digits to handwritten ones",
    text=f"""The ten digits in the text faces of matplotlib's fonts (8 x 8 pixels, shifted, scaled and rotated at
random) to learn from in {STEPS} steps, all 1,797 handwritten digits of scikit-learn to be tested on. The term stands on
the last layer's input. No weight is chosen: all are shown.""",
    groups=("printed to handwritten",),
    methods={
        "no term": (0.0,),
        **{f"VNE, weight {weight:g}": (weight,) for weight in (0.03, 0.1, 0.3, -0.03, -0.1, -0.3)},
    },
    reference="no term",
    seeds=20,
    score="handwritten",
    higher=True,
    columns={"handwritten": "handwritten, accuracy in %", "printed": "printed, accuracy in %"},
    run=run,
)
