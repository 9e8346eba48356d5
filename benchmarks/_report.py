"""Machine descriptions and tables of the benchmarks."""

import datetime
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def describe_machine(device: str) -> str:
    """One line with processor, torch version, time and measured commit."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{_processor(device)}; torch {torch.__version__}; {now}; commit {_commit()}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column to the left and the others to the right, as wide as their entries."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (header, rules, *rows)
    )


# The 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 for more.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """The mean over training seeds with the half-width of its 95 % interval, by Student's t."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean of at least two values, by Student's t."""
    quantile = _QUANTILES[len(values) - 2] if len(values) - 2 < len(_QUANTILES) else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _commit() -> str:
    """The commit, with "-dirty" if a tracked file differs from it, except stored measurements and their pages."""
    folder = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always"], cwd=folder, capture_output=True, text=True, check=False)
    changed = [
        "git",
        "diff",
        "--quiet",
        "HEAD",
        "--",
        ":(top)",
        ":(top,exclude)*.json",
        ":(top,exclude)docs/benchmarks",
    ]
    dirty = subprocess.run(changed, cwd=folder, capture_output=True, check=False).returncode != 0
    return f"{found.stdout.strip()}{'-dirty' * dirty}" if found.returncode == 0 else "unknown"


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
