"""Two views of a sample are pulled together in batches of 8 and 32: what keeps the representation from collapsing?"""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_plugins.callbacks import RepresentationRegularization, VNERegularization
from lightning_plugins.functional import effective_rank
from lightning_plugins.regularizers import SIGReg, VICRegCovariance, VICRegVariance
from representation_parts.part import Part, Run, quiet_trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from demo import moved as moved_images

STEPS = 400
LABELS = 5  # of each class, to learn the probe from
QUEUE = 256


def moved_series(series: Tensor) -> Tensor:
    """A window of half of each series or more, stretched to the whole, rescaled, with noise."""
    n, _, length = series.shape
    share = 0.5 + 0.5 * torch.rand(n, 1)
    begin = torch.rand(n, 1) * (1 - share)
    places = (begin + share * torch.linspace(0, 1, length)) * (length - 1)
    low = places.floor().long().clamp(max=length - 2)
    part = (places - low)[:, None]
    left, right = (series.gather(2, at[:, None].expand_as(series)) for at in (low, low + 1))
    scale = 1 + 0.2 * torch.randn(n, 1, 1)
    return scale * torch.lerp(left, right, part) + 0.1 * torch.randn_like(series)


def read_series(name: str, length: int = 128) -> tuple[Tensor, Tensor]:
    """A data set of the package aeon, each series brought to one length, mean 0 and deviation 1.

    The package is found without importing it, which would import all it depends on.
    """
    from importlib.util import find_spec

    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the time series are those of the package aeon: pip install --no-deps aeon")
    folder = Path(spec.origin).parent / "datasets" / "data" / name
    series, labels = [], []
    for part in ("TRAIN", "TEST"):
        lines = (folder / f"{name}_{part}.ts").read_text().splitlines()
        for line in lines[lines.index("@data") + 1 :]:
            *channels, label = line.split(":")
            values = torch.tensor([[float(value) for value in channel.split(",")] for channel in channels])
            series.append(F.interpolate(values[None], size=length, mode="linear")[0])
            labels.append(label)
    values = torch.stack(series)
    values = (values - values.mean(2, keepdim=True)) / (values.std(2, keepdim=True) + 1e-6)
    return values, torch.tensor([sorted(set(labels)).index(label) for label in labels])


@cache
def data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test samples with their labels: 50, 20 and 30 percent, the same for all runs."""
    if name == "digits":
        digits = load_digits()
        inputs, labels = torch.tensor(digits.images / 8 - 1).float()[:, None], torch.tensor(digits.target)
    else:
        inputs, labels = read_series(name)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cuts = [round(0.5 * len(order)), round(0.7 * len(order))]
    return [(inputs[part], labels[part]) for part in order.tensor_split(cuts)]


def encoder(name: str, channels: int) -> nn.Module:
    if name == "digits":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 128), nn.ReLU(),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv1d(channels, 32, 7, stride=2, padding=3), nn.ReLU(),
        nn.Conv1d(32, 64, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv1d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 128), nn.ReLU(),
    )  # fmt: skip


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(one, other).mean()


def barlow_twins(one: Tensor, other: Tensor, off: float) -> Tensor:
    a, b = ((z - z.mean(dim=0)) / (z.std(dim=0, correction=0) + 1e-5) for z in (one, other))
    correlation = a.T @ b / len(a)
    diagonal = torch.diagonal(correlation)
    return (diagonal - 1).square().sum() + off * (correlation.square().sum() - diagonal.square().sum())


class Views(LightningModule):
    """An encoder, a projector, and a loss of the projections of two views."""

    def __init__(self, run: Run, channels: int) -> None:
        super().__init__()
        self.run, name = run, run.group.split(",")[0]
        self.encoder = encoder(name, channels)
        self.projector = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
        self.predictor = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
        self.moved: Callable[[Tensor], Tensor] = moved_images if name == "digits" else moved_series

    def forward(self, inputs: Tensor) -> Tensor:
        return self.projector(self.encoder(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        one, other = (self(self.moved(batch[0])) for _ in range(2))
        method = self.run.method
        if method == "SimSiam":
            pairs = ((self.predictor(one), other.detach()), (self.predictor(other), one.detach()))
            return sum(cosine(*pair) for pair in pairs) / 2
        if method == "SimSiam without its stop-gradient":
            return (cosine(self.predictor(one), other) + cosine(self.predictor(other), one)) / 2
        if method == "Barlow Twins":
            return barlow_twins(one, other, self.run.knob)
        if method in {"VICReg", "SIGReg"}:
            return F.mse_loss(one, other)
        return cosine(one, other)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        searched = self.run.method in {"views alone", "SimSiam", "SimSiam without its stop-gradient"}
        return torch.optim.AdamW(self.parameters(), lr=self.run.knob if searched else 2e-3)


def callbacks(method: str, knob: float) -> list[Callback]:
    """The term on the projections; the weights of VICReg's and LeJEPA's parts are as published, times the knob."""
    if method == "VNE":
        return [VNERegularization("projector", knob)]
    if method == f"VNE, queue of {QUEUE}":
        return [VNERegularization("projector", knob, queue_size=QUEUE)]
    if method == "VICReg":
        terms = (VICRegVariance(), knob), (VICRegCovariance(), knob / 25)
        return [RepresentationRegularization("projector", term, weight) for term, weight in terms]
    if method == "SIGReg":
        return [RepresentationRegularization("projector", SIGReg(), knob)]
    return []


def measure(model: Views, search: bool) -> dict[str, float]:
    """A logistic regression on the encoder's features of a few samples, and the effective rank of the projections."""
    train, val, test = data(model.run.group.split(",")[0])
    inputs, labels = val if search else test
    model.eval()
    with torch.no_grad():
        known, unseen = model.encoder(train[0]), model.encoder(inputs)
        rank = effective_rank(model(inputs))
    centre, spread = known.mean(0), known.std(0) + 1e-6
    known, unseen = (((part - centre) / spread).numpy() for part in (known, unseen))
    rows = torch.cat([torch.nonzero(train[1] == label)[:LABELS, 0] for label in train[1].unique()])
    probe = LogisticRegression(max_iter=500, C=0.1).fit(known[rows.numpy()], train[1][rows].numpy())
    return {"accuracy": 100 * float(probe.score(unseen, labels.numpy())), "rank": float(rank)}


def run(one: Run) -> dict[str, float]:
    name, batch = one.group.split(", batches of ")
    (inputs, labels), *_ = data(name)
    seed_everything(one.seed, verbose=False)
    model = Views(one, inputs.shape[1])
    if one.method != "random encoder":
        dataset = TensorDataset(inputs, labels)
        sampler = RandomSampler(dataset, num_samples=STEPS * int(batch))
        loader = DataLoader(dataset, int(batch), sampler=sampler)
        quiet_trainer(STEPS, callbacks(one.method, one.knob)).fit(model, loader)
    return measure(model, one.search)


RATES = (5e-4, 2e-3, 5e-3)
PART = Part(
    title="Small batches without labels",
    text=f"""Two views of a sample are pulled together for {STEPS} steps; the first row has no other term, and its
optimum is a constant. scikit-learn's digits. A small convolutional encoder and projector without batch normalisation;
AdamW. Half of the samples to train on, 20 % to choose with, 30 % to test. Accuracy is that of a logistic regression on
the frozen encoder's features of {LABELS} labels a class; the rank is the effective rank of the projections (64 wide).
Every method had three settings on one further seed, chosen by validation accuracy: its weight, or the learning rate
where there is none.""",
    groups=tuple(f"{name}, batches of {batch}" for name in ("digits", "OSULeaf") for batch in (8, 32)),
    methods={
        "views alone": RATES,
        "random encoder": (0.0,),
        "VNE": (0.1, 0.3, 1.0),
        f"VNE, queue of {QUEUE}": (1.0, 3.0, 10.0),  # one row of the queue and batch weighs less
        "VICReg": (0.3, 1.0, 3.0),
        "Barlow Twins": (0.005, 0.0156, 0.05),
        "SIGReg": (0.01, 0.03, 0.1),
        "SimSiam": RATES,
        "SimSiam without its stop-gradient": RATES,
    },
    reference="VNE",
    seeds=5,
    score="accuracy",
    higher=True,
    columns={"accuracy": "accuracy in %", "rank": "effective rank"},
    run=run,
)
