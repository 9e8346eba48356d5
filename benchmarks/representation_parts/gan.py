"""A small GAN on digits with the entropy of the discriminator's features in the discriminator's loss."""

from functools import cache

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_plugins.functional import effective_rank
from lightning_plugins.mixins import VNEMixin
from representation_parts.fonts import handwritten
from representation_parts.part import Part, Run, quiet_trainer

STEPS, BATCH, NOISE, DRAWN = 1500, 64, 32, 5000


class GAN(VNEMixin, LightningModule):
    """Two networks of three layers, with the non-saturating loss and two optimizers."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.automatic_optimization, self.weight = False, weight
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh(),
        )  # fmt: skip
        self.features = nn.Sequential(nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Linear(256, 128), nn.LeakyReLU(0.2))
        self.head = nn.Linear(128, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        real, fake = batch[0], self.generator(torch.randn(len(batch[0]), NOISE))
        features = [self.features(images) for images in (real, fake.detach())]
        judged = [self.head(part) for part in features]
        loss = F.softplus(-judged[0]).mean() + F.softplus(judged[1]).mean()
        if self.weight:
            loss = loss + sum(self.vne_penalty(part, self.weight) for part in features) / 2
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        loss = F.softplus(-self.head(self.features(fake))).mean()
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        discriminator = [*self.features.parameters(), *self.head.parameters()]
        groups = (self.generator.parameters(), discriminator)
        return [torch.optim.Adam(group, lr=2e-4, betas=(0.5, 0.999)) for group in groups]


@cache
def judge() -> nn.Sequential:
    """A classifier of digits, trained once, whose hidden features the distance is measured on."""
    torch.manual_seed(0)
    images, labels = handwritten()
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(600):
        rows = torch.randint(len(images), (128,))
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the means and covariances of two samples of features."""
    means, covariances = zip(
        *((rows.mean(0), torch.cov(rows.T)) for rows in (one.double(), other.double())), strict=True
    )
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    spread = torch.trace(covariances[0]) + torch.trace(covariances[1]) - 2 * cross
    return float((means[0] - means[1]).square().sum() + spread)


def run(one: Run) -> dict[str, float]:
    images, _ = handwritten()
    seed_everything(one.seed, verbose=False)
    model, dataset = GAN(one.knob), TensorDataset(images.flatten(1))
    sampler = RandomSampler(dataset, num_samples=STEPS * BATCH)
    quiet_trainer(2 * STEPS).fit(model, DataLoader(dataset, BATCH, sampler=sampler, drop_last=True))
    model.eval()
    network = judge()
    with torch.no_grad():
        made = model.generator(torch.randn(DRAWN, NOISE))
        seen = [network[:-1](part) for part in (images, made)]
        share = network(made).softmax(1).mean(0)
        return {
            "distance": frechet_distance(*seen),
            "classes": float(torch.special.entr(share).sum().exp()),
            "rank": float(effective_rank(model.features(images.flatten(1)))),
        }


PART = Part(
    title="A GAN",
    text=f"""A generator and a discriminator of three linear layers each, the non-saturating loss, {STEPS} steps on
scikit-learn's digits. The term, the mean of those of real and of generated images, stands in the discriminator's loss.
The distance is Fréchet's between features of {DRAWN:,} generated and all real digits in a classifier of digits (less is
better); the classes are the exponential of the entropy of the classifier's mean prediction for generated digits, 10 if
all are generated alike. No weight is chosen: all are shown.""",
    groups=("digits",),
    methods={
        "no term": (0.0,),
        **{f"VNE, weight {weight:g}": (weight,) for weight in (0.1, 0.35, -0.1)},
    },
    reference="no term",
    seeds=5,
    score="distance",
    higher=False,
    columns={"distance": "Fréchet distance", "classes": "classes", "rank": "effective rank of the features"},
    run=run,
)
