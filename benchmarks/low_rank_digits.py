"""Accuracy against the removed fraction of the weights, on handwritten digits: BSR, energy threshold, plain truncation.

All train for the same number of steps with the same learning rate schedule. BSR searches ranks by a beam search and
regularizes the weights towards them; the energy threshold chooses ranks from the weights alone when they are split;
both then fine-tune for the same number of steps. Plain truncation keeps the same fraction of the rank in every layer of
the dense network, at the end, without fine-tuning.

    python benchmarks/low_rank_digits.py                       # ResNet, three seeds, three ratios
    python benchmarks/low_rank_digits.py --network vit

Results of every run are stored in a file and reused, so that an interrupted study can be continued.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lightning_plugins.callbacks import LowRankCompression, Penalty, SearchSettings, Timing
from lightning_plugins.compression import equal_ratio, factorize
from lightning_plugins.plots import trade_off_figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from digits import Classifier, Digits

NETWORKS = {"resnet": "test_resnet", "vit": "vit_tiny_patch16_224"}
SETTINGS = {"vit": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "lr": 2e-3}}
LAYERS = {"resnet": "net.layer*", "vit": "net.blocks.*"}
SEARCH_AT, SPLIT_AT = 0.3, 0.7


def accuracy(model: Classifier, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return (model.net(images).argmax(1) == labels).float().mean()


def fit(network: str, seed: int, epochs: int, callbacks: list[Callback]) -> tuple[Classifier, float]:
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    model, data = Classifier(NETWORKS[network], **SETTINGS.get(network, {})), Digits()
    trainer.fit(model, data.train_dataloader())
    return model, measure(model)


def measure(model: Classifier) -> float:
    (metrics,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        model, Digits().val_dataloader(), verbose=False
    )
    return metrics["accuracy"]


def run(network: str, seed: int, epochs: int, ratios: list[float], weight: float, store: dict[str, float]) -> None:
    """All runs of one seed, one entry of the store each."""
    head, layers = f"{network} {seed}", LAYERS[network]
    if f"{head} dense" not in store:
        model, store[f"{head} dense"] = fit(network, seed, epochs, [])
        for ratio in ratios:
            copied = Classifier(NETWORKS[network], **SETTINGS.get(network, {}))
            copied.load_state_dict(model.state_dict())
            factorize(copied, equal_ratio(copied, budget=1 - ratio, layers=layers).ranks)
            store[f"{head} truncation {ratio}"] = measure(copied)
    for ratio in ratios:
        for method in ("BSR", "energy"):
            if f"{head} {method} {ratio}" in store:
                continue
            if method == "BSR":
                options = {"width": 2, "step": 0.04, "bounds": (0, 1)}
                callback = LowRankCompression(
                    layers,
                    budget=1 - ratio,
                    search=SearchSettings(options=options, score=accuracy, batches=4),
                    penalty=Penalty(weight=weight, every_n_steps=4),
                    timing=Timing(search_at=SEARCH_AT, factorize_at=SPLIT_AT),
                )
            else:
                timing = Timing(search_at=SPLIT_AT, factorize_at=SPLIT_AT)
                callback = LowRankCompression(layers, budget=1 - ratio, penalty=0, search="energy", timing=timing)
            store[f"{head} {method} {ratio}"] = fit(network, seed, epochs, [callback])[1]
            print(f"{head} {method} {ratio}: {store[f'{head} {method} {ratio}']:.3f}", flush=True)
            save(store)


def spread(scores: list[float]) -> str:
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return f"{100 * statistics.mean(scores):.1f} ± {100 * deviation:.1f}"


STORE = ROOT / "results" / "local" / "low_rank_digits.json"


def save(store: dict[str, float]) -> None:
    STORE.parent.mkdir(parents=True, exist_ok=True)
    STORE.write_text(json.dumps(store, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--weight", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store: dict[str, float] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for seed in range(options.seeds):
        run(options.network, seed, options.epochs, options.ratios, options.weight, store)
        save(store)

    def scores(what: str) -> list[float]:
        return [store[f"{options.network} {seed} {what}"] for seed in range(options.seeds)]

    print(describe_machine("cpu"))
    methods = {"BSR": "BSR", "energy": "energy threshold, fine-tuned", "truncation": "equal ratio, not fine-tuned"}
    rows = [[name, *(spread(scores(f"{key} {ratio}")) for ratio in options.ratios)] for key, name in methods.items()]
    header = ["accuracy in %, mean ± standard deviation", *(f"{ratio:.0%} removed" for ratio in options.ratios)]
    print(markdown_table(header, [["dense", *[spread(scores("dense"))] * len(options.ratios)], *rows]))
    figure = trade_off_figure(
        {name: {ratio: scores(f"{key} {ratio}") for ratio in options.ratios} for key, name in methods.items()},
        xlabel="weights removed",
        ylabel="validation accuracy",
        reference=("dense", statistics.mean(scores("dense"))),
        title=f"Digits, {NETWORKS[options.network]}",
    )
    path = STORE.with_name(f"low_rank_digits_{options.network}.png")
    figure.savefig(path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
