"""Accuracy of exact probes after one pass, compared with an online probe trained by SGD for ten epochs.

The online probe is that of self-supervised libraries: a linear layer on frozen features, cross entropy, SGD with
momentum 0.9 and a cosine schedule, here with the best of three learning rates on an inner fold. Both use the same rows
of the same folds. Features are the pixels of scikit-learn's digits, and the outputs of a frozen timm network (ResNet-18
with random weights, no download, norm statistics from the images).

    python benchmarks/online_probe.py
"""

import argparse
import time

import timm
import torch
from _report import describe_machine, markdown_table
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_plugins.functional import assign_folds
from lightning_plugins.metrics import LinearProbe, NearestNeighbourProbe

RATES = (0.01, 0.1, 1.0)
EPOCHS = 10


def features_of(name: str, images: Tensor) -> Tensor:
    if name == "pixels":
        return images.flatten(1)
    torch.manual_seed(0)
    # With the default zeros in the last norm of each block only the shortcuts are active, which see one corner.
    network = timm.create_model("resnet18", pretrained=False, in_chans=1, num_classes=0, zero_init_last=False)
    with torch.no_grad():
        upsampled = torch.nn.functional.interpolate(images[:, None], size=32, mode="bilinear")
        for part in upsampled.split(128):  # norm statistics: with the initial ones features are uninformative
            network(part)
        network.eval()
        return torch.cat([network(part) for part in upsampled.split(128)])


def online_accuracy(x: Tensor, y: Tensor, folds: Tensor, seed: int) -> float:
    """Mean over the folds; the learning rate is chosen on the next fold, then the probe is trained on both."""
    correct = 0
    for fold in range(5):
        inner, outer = folds == (fold + 1) % 5, folds == fold
        rest = ~(inner | outer)
        rate = max(RATES, key=lambda r: train(x[rest], y[rest], x[inner], y[inner], (r, seed)))
        correct += train(x[~outer], y[~outer], x[outer], y[outer], (rate, seed))
    return correct / len(x)


def train(x: Tensor, y: Tensor, held_out: Tensor, targets: Tensor, settings: tuple[float, int]) -> int:
    """Number of correctly classified held-out rows after ten epochs."""
    rate, seed = settings
    torch.manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.normal_(head.weight, std=0.01)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    batches = EPOCHS * -(-len(x) // 256)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return int((head(held_out).argmax(1) == targets).sum())


def exact(x: Tensor, y: Tensor, classifier: str, seed: int) -> float:
    probe = LinearProbe(x.shape[1], 10, task="classification", classifier=classifier, seed=seed, controls=0)  # type: ignore[arg-type]  # a name out of the table below
    for rows in torch.arange(len(x)).split(256):
        probe.update(x[rows], y[rows], rows)
    return float(probe.compute().accuracy)


def neighbours(x: Tensor, y: Tensor) -> float:
    probe = NearestNeighbourProbe(x.shape[1], 10)
    probe.update(x, y, torch.arange(len(x)))
    return float(probe.compute().accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="of folds, and of the online probe's order")
    seeds = range(parser.parse_args().seeds)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    y, numbers = torch.tensor(digits.target), torch.arange(len(images))
    print(describe_machine("cpu"), "\n")
    rows = []
    for name in ("pixels", "resnet18"):
        x = features_of(name, images)
        methods = {
            **{kind: (lambda seed, k=kind, x=x: exact(x, y, k, seed)) for kind in ("ridge", "lda", "softmax")},
            "nearest neighbours": lambda seed, x=x: neighbours(x, y),
            "SGD online, 10 epochs": lambda seed, x=x: online_accuracy(x, y, assign_folds(numbers, 5, seed=seed), seed),
        }
        for method, run in methods.items():
            started = time.process_time()
            values = torch.tensor([run(seed) for seed in seeds], dtype=torch.float64)
            seconds = (time.process_time() - started) / len(values)
            half = 2.78 * float(values.std()) / len(values) ** 0.5  # Student's t of five
            rows.append([name, method, f"{float(values.mean()):.4f} ± {half:.4f}", f"{seconds:.2f}"])
            print(*rows[-1], sep=", ", flush=True)
    print(markdown_table(["features", "probe", "held-out accuracy", "CPU s"], rows))


if __name__ == "__main__":
    main()
