"""No public callback without rows in a contract and a card; the same for terms of a loss."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightning_plugins import callbacks, regularizers
from tests import contract_compression
from tests.contract_table import SETTINGS

ROOT = Path(__file__).parent.parent
CARDS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "methods").glob("*.md")}
HEADINGS = ("How to use it", "What it costs", "When it does not help")
PUBLIC = {name: getattr(callbacks, name) for name in callbacks.__all__}
CALLBACKS = [name for name, value in PUBLIC.items() if isinstance(value, type) and issubclass(value, Callback)]
# What a callback needs that the tables do not have stands in files of its own.
OWN_CONTRACTS = {
    "CalibrationRecorder": "tests/callbacks/test_calibration_recorder.py",
    "LowRankCompression": "tests/callbacks/test_low_rank_compression_resume.py",
}


def has_card(name: str) -> bool:
    """Return whether a card with the required headings shows a use of the name."""
    return any(
        re.search(rf"\b{name}\b", text) and all(f"\n## {heading}\n" in text for heading in HEADINGS)
        for text in CARDS.values()
    )


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_is_in_a_contract(name: str):
    text = "\n".join(setting.yaml for setting in [*SETTINGS.values(), *contract_compression.COMPRESSIONS.values()])
    assert f"lightning_plugins.callbacks.{name}\n" in text or (ROOT / OWN_CONTRACTS.get(name, "none")).is_file()


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_callback_has_a_card(name: str):
    assert has_card(name)


@pytest.mark.parametrize("name", [name for name in regularizers.__all__ if name not in {"EmbeddingTerm", "Quadrature"}])
def test_every_term_has_a_card_and_a_test(name: str):
    assert has_card(name)
    module = getattr(regularizers, name).__module__.rpartition(".")[2]
    assert (ROOT / "tests" / "regularizers" / f"test_{module}.py").exists()


def test_a_name_without_a_card_is_found_out():
    assert not has_card("HoyerSparsity")


@pytest.mark.parametrize("name", sorted(CARDS))
def test_cards_begin_with_a_title(name: str):
    assert CARDS[name].startswith("# ")
