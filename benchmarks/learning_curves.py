"""Learning curves of random configurations of a small network on handwritten digits, a table for replayed searches.

Each of 800 configurations trains a network with two hidden layers for 40 epochs on 900 of scikit-learn's digits; behind
every epoch its errors on the other 897 are counted. Those of one batch size train side by side as one batched network:
narrow ones are padded with units whose weights are and stay zero. The curves go into ``learning_curves.json`` beside
this file, and a batch size that is there is not trained again.

    python benchmarks/learning_curves.py
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _report import describe_machine
from torch import Tensor, nn

STORE = Path(__file__).with_suffix(".json")
COUNT, EPOCHS, TRAINING, WIDEST = 800, 40, 900, 64
BATCHES = (16, 32, 64, 128, 256)
NAMES = ("lr", "momentum", "weight_decay", "width", "batch_size", "dropout")


class Digits(NamedTuple):
    """Images of shape ``(n, 64)`` and labels, for training and validation."""

    images: Tensor
    labels: Tensor
    unseen_images: Tensor
    unseen_labels: Tensor


def digits() -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    labels = torch.tensor(data.target[order])
    return Digits(images[:TRAINING], labels[:TRAINING], images[TRAINING:], labels[TRAINING:])


def configuration(row: int) -> dict[str, Any]:
    """The random configuration of a row, numbers to four digits."""
    rng = np.random.default_rng([7, row])
    drawn = {
        "lr": 10 ** rng.uniform(-4, 0),
        "momentum": 1 - 10 ** rng.uniform(-2, 0),
        "weight_decay": 10 ** rng.uniform(-6, -2),
        "width": int(2 ** rng.uniform(3, 6)),
        "batch_size": int(rng.choice(BATCHES)),
        "dropout": rng.uniform(0, 0.6),
    }
    return {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in drawn.items()}


def initial_weights(settings: dict[str, Any]) -> list[Tensor]:
    """Weights and biases of two hidden layers and the output, padded to the largest width with zeros."""
    width, weights = settings["width"], []
    hidden = (width, WIDEST)  # sizes without and with padding
    for inputs, outputs in ((64, 64), hidden), (hidden, hidden), (hidden, (10, 10)):
        layer = nn.Linear(inputs[0], outputs[0])
        weight, bias = torch.zeros(inputs[1], outputs[1]), torch.zeros(1, outputs[1])
        weight[: inputs[0], : outputs[0]], bias[:, : outputs[0]] = layer.weight.detach().T, layer.bias.detach()
        weights += [weight, bias]
    return weights


def forward(weights: list[Tensor], images: Tensor, dropout: Tensor | None = None) -> Tensor:
    """Logits ``(networks, n, 10)`` of images ``(networks, n, 64)``."""
    hidden = images
    for layer in range(0, len(weights), 2):
        hidden = torch.baddbmm(weights[layer + 1], hidden, weights[layer])
        if layer + 2 < len(weights):
            hidden = hidden.relu()
            if dropout is not None:
                hidden = hidden * (torch.rand_like(hidden) >= dropout) / (1 - dropout)
    return hidden


def train(group: list[dict[str, Any]], data: Digits, seed: int, epochs: int = EPOCHS) -> list[list[int]]:
    """Train configurations of one batch size, and return the numbers of errors behind each epoch of each."""
    torch.manual_seed(seed)
    drawn = [initial_weights(settings) for settings in group]
    weights = [torch.stack(each).requires_grad_() for each in zip(*drawn, strict=True)]
    speeds = [torch.zeros_like(weight) for weight in weights]
    lr, momentum, decay, dropout = (
        torch.tensor([settings[name] for settings in group])[:, None, None]
        for name in ("lr", "momentum", "weight_decay", "dropout")
    )
    wrong = []
    for _ in range(epochs):
        order = torch.rand(len(group), len(data.labels)).argsort(1)
        for rows in order.split(group[0]["batch_size"], dim=1):
            logits = forward(weights, data.images[rows], dropout)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), data.labels[rows].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / rows.shape[1], weights)
            with torch.no_grad():
                for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
                    speed.mul_(momentum).add_(gradient + decay * weight)
                    weight.sub_(lr * speed)
        with torch.no_grad():
            found = forward(weights, data.unseen_images.expand(len(group), -1, -1))
        right = (found.argmax(2) == data.unseen_labels) & found.isfinite().all(2)  # a diverged network is wrong
        wrong.append((~right).sum(1))
    return torch.stack(wrong, 1).tolist()


def save(stored: dict[str, Any], path: Path = STORE) -> None:
    """Write the table, one line a configuration."""
    rows = [f'"{row}":{json.dumps(kept, separators=(",", ":"))}' for row, kept in sorted(stored["rows"].items())]
    head = {name: value for name, value in stored.items() if name != "rows"}
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": {{\n' + ",\n".join(rows) + "\n}}\n", encoding="utf-8")


def load(path: Path = STORE) -> dict[str, Any]:
    """The table so far: ``settings`` and numbers of ``wrong`` images by row."""
    if not path.exists():
        return {"machine": "", "names": NAMES, "images": len(digits().unseen_labels), "rows": {}}
    stored = dict(json.loads(path.read_text(encoding="utf-8")))
    return {**stored, "rows": {int(row): kept for row, kept in stored["rows"].items()}}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    data, stored = digits(), load()
    all_rows = {row: configuration(row) for row in range(COUNT)}
    for batch_size in BATCHES:
        rows = [row for row, settings in all_rows.items() if settings["batch_size"] == batch_size]
        if all(row in stored["rows"] for row in rows):
            continue
        for row, wrong in zip(rows, train([all_rows[row] for row in rows], data, batch_size), strict=True):
            stored["rows"][row] = {"settings": [all_rows[row][name] for name in NAMES], "wrong": wrong}
        stored["machine"] = describe_machine("cpu")
        save(stored)
        print(f"batch size {batch_size}: {len(rows)} configurations", flush=True)


if __name__ == "__main__":
    main()
