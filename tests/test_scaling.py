"""Bytes that callbacks exchange are those on paper, counted by the benchmark's own means on two processes."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_plugins import callbacks
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the script imports its neighbours as it does when it is run
scaling = importlib.import_module("scaling")
cases = importlib.import_module("_scaling_cases")
exchanges = importlib.import_module("_scaling_exchanges")
pages = importlib.import_module("_scaling_page")

WITHIN = 0.2


def test_every_callback_is_measured_or_named():
    named = {word for name in (*cases.CASES, *cases.REST) for word in re.findall(r"\w+", name)}
    public = {name: getattr(callbacks, name) for name in callbacks.__all__}
    kinds = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, scaling.Callback)}
    assert len(kinds) > 15
    assert kinds <= named


@pytest.mark.parametrize(
    ("kind", "items", "processes", "received"),
    # by hand: a ring of four passes on three quarters of the blocks, twice for a sum; a tree reaches three of four
    [("reduce", 8, 4, 2 * 6 * 4), ("gather", 8, 4, 3 * 32), ("send", 8, 4, 3 / 4 * 32), ("reduce", 8, 1, 0)],
)
def test_bytes_of_an_exchange(kind: str, items: int, processes: int, received: float):
    assert exchanges.Exchange(kind, items, 4).received(processes) == received


def size_of(name: str) -> Any:
    """One where the matrix travels, for the term that may exchange rows."""
    return exchanges.Size(*cases.CASES[name].sizes[name == "VNERegularization"], 2)


def count(rank: int, names: list[str]) -> dict[str, float]:
    act_as_rank(rank, 2)
    found = {}
    for name in names:
        case, size = cases.CASES[name], size_of(name)
        bare, with_it = (scaling.train(size, case.unit, made)["bytes"] for made in ([], [case.make(size)]))
        found[name] = with_it - bare
    return found


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_counted_bytes_are_those_on_paper(tmp_path: Any):
    names = ["VNERegularization", "SpectralNormCap", "HybridCompression", "LayerProbe", "MutualInformationMonitor"]
    ranks = run_on_ranks(count, 2, tmp_path, names)
    for name in names:
        every = cases.CASES[name].exchanges(size_of(name))
        wanted = sum(one.received(2) + one.headers(2) for one in every)
        assert sum(found[name] for found in ranks) / 2 == pytest.approx(wanted, rel=WITHIN), name


def test_what_is_stored_is_near_the_paper_and_stands_on_the_page():
    report = scaling.load()
    assert list(report) == ["1", "2", "4", "8"]
    found = list(pages.compared(report))
    assert {line.case for line in found} == cases.CASES.keys()
    assert all(abs(line.ratio - 1) < WITHIN for line in found)
    assert scaling.STORE.with_suffix(".md").read_text() == pages.page(report, json.loads(scaling.LINKED.read_text()))
