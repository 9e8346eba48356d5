"""Write the Quantus reference values for the tests of attribution scores; Quantus is not a dependency.

PYTHONPATH=<where quantus 0.6.0 is> python tools/attribution_oracle.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

TARGET = Path(__file__).parents[1] / "tests" / "functional" / "attribution_oracle.json"
QUIET: dict[str, object] = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}


def network() -> nn.Module:
    """Fixed weights without a random generator, which may change between versions."""
    model = nn.Sequential(nn.Conv1d(1, 3, 7, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_((torch.sin(1.7 * steps + 0.3) / 2).reshape(parameter.shape))
    return model


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    t = np.arange(4 * 64).reshape(4, 1, 64)
    x, maps = np.sin(0.37 * t) + 0.4 * np.cos(1.9 * t), np.abs(np.sin(2.3 * t + 1) + 0.3 * np.cos(0.11 * t))
    masks = np.zeros((4, 1, 64), dtype=bool)
    for row, (begin, end) in enumerate([(3, 20), (30, 64), (10, 12), (0, 40)]):
        masks[row, :, begin:end] = True
    return x.astype("float32"), maps.astype("float32"), masks


def main() -> None:
    import quantus  # the tests import data and network from here without Quantus

    x, maps, masks = data()
    y, model = np.array([0, 1, 1, 0]), network()
    shared = {"model": model, "x_batch": x, "y_batch": y, "a_batch": maps, "device": "cpu"}
    by_mask = {
        "attribution_localization": quantus.AttributionLocalisation(**QUIET),
        "rank_accuracy": quantus.RelevanceRankAccuracy(**QUIET),
        "pointing_game": quantus.PointingGame(**QUIET),
        "auroc": quantus.AUC(**QUIET),
        "top_10": quantus.TopKIntersection(k=10, **QUIET),
    }
    found = {name: [float(v) for v in metric(s_batch=masks, **shared)] for name, metric in by_mask.items()}
    for order in ("morf", "lerf"):
        metric = quantus.RegionPerturbation(
            patch_size=8, regions_evaluation=8, order=order, perturb_baseline="black", **QUIET
        )
        curves = metric(softmax=True, **shared)
        found[f"region_perturbation_{order}"] = [[float(v) for v in curve] for curve in curves]
    TARGET.write_text(json.dumps({"quantus": quantus.__version__, **found}, indent=1) + "\n")
    print(f"written {TARGET.name}: {list(found)}")


if __name__ == "__main__":
    main()
