"""Average precision of the example's network, by augmentation, fraction of labelled frames and seed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "point_cloud_augmentation.py"
METHODS = ("none", "ground-truth sampling", "PolarMix", "DR.CPO")
SHARES = ("0.1", "0.3", "1.0")


def run(seeds: int, load: Callable[[], dict], keep: Callable[[str, object], None]) -> None:
    """Run missing cases, the smallest fraction first, each seed in one run of the example's script."""
    for share in SHARES:
        for seed in range(seeds):
            found = load().get("precision", {})
            missing = [method for method in METHODS if f"{share}/{method}/{seed}" not in found]
            if missing:
                settings = {"EXAMPLE_SEED": str(seed), "EXAMPLE_SHARE": share, "EXAMPLE_METHODS": ",".join(missing)}
                for method, value in _trained(settings):
                    found[f"{share}/{method}/{seed}"] = value
                    keep("precision", found)  # immediately, so that an interrupted run can resume
                    print(share, method, seed, value, flush=True)


def _trained(settings: dict[str, str]) -> Iterator[tuple[str, float]]:
    command, environment = [sys.executable, "-u", str(EXAMPLE)], {**os.environ, **settings}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if match := re.match(r"average precision, (.*): ([\d.]+)", line):
                yield match[1], float(match[2])
    if process.returncode:
        raise RuntimeError(f"{EXAMPLE.name} failed with {settings}, exit status {process.returncode}")
