"""Average precision of the example's network, by augmentation, share of the labelled frames and seed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "point_cloud_augmentation.py"
METHODS = ("none", "ground-truth sampling", "PolarMix", "DR.CPO")


def run(seeds: int, load: Callable[[], dict], keep: Callable[[str, object], None]) -> None:
    """Train what is not stored yet, seeds first, each in the example's own script."""
    for seed in range(seeds):
        for share in ("0.1", "0.3", "1.0"):
            for method in METHODS:
                name = f"{share}/{method}/{seed}"
                found = load().get("precision", {})
                if name in found:
                    continue
                settings = {"EXAMPLE_SEED": str(seed), "EXAMPLE_SHARE": share, "EXAMPLE_METHODS": method}
                done = subprocess.run(
                    [sys.executable, str(EXAMPLE)],
                    env={**os.environ, **settings},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                match = re.search(r"average precision, .*: ([\d.]+)", done.stdout)
                if match is None:
                    raise RuntimeError(f"{EXAMPLE.name} printed no average precision:\n{done.stdout}")
                found[name] = float(match[1])
                keep("precision", found)
                print(name, found[name], flush=True)
