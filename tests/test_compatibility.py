import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))  # the script imports its neighbours as it does when it is run
compatibility = importlib.import_module("compatibility")
checks = importlib.import_module("compatibility_checks")
cases = importlib.import_module("compatibility_cases")
others = importlib.import_module("compatibility_others")

# The classifier takes a vector, a map, the output of a hidden layer; there are two of it, or four.
FAMILIES = ["resnet", "resnetv2", "deit", "efficientvim", "vision_transformer", "swin_transformer", "vgg", "iformer"]
REPRESENTATIVE = [
    *(case for case in cases.timm_cases() if case.family in FAMILIES),
    *cases.inner_cases(),
    *others.transformers_cases(),
    *others.demo_cases(),
    *(case for case in cases.recomputing_cases() if case.model in {"test_vit", "densenet121"}),
    *(case for case in others.recomputing_transformers_cases() if case.family in {"Bert", "Llama"}),
]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    compatibility.quieten()


@pytest.mark.filterwarnings("ignore")  # what other people's networks warn of
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda case: f"{case.model}-{case.layers[0]}-{case.reentrant}")
def test_the_term_is_right_on_a_network_of_others(case):
    assert checks.try_case(case).problem == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda settings: {"weight": 2 * settings["weight"]}, "loss went from"),
        (
            lambda settings: {"readout": checks.Readout(pool=lambda features: features.detach())},
            "the term reached 0 of",
        ),
        (lambda settings: {"readout": checks.Readout(pool=lambda features: features[1:])}, "by NumPy"),
    ],
    ids=["wrong weight", "no gradient", "missing row"],
)
def test_the_checks_notice_what_is_wrong(monkeypatch, change, problem):
    right = checks.VNERegularization
    monkeypatch.setattr(checks, "VNERegularization", lambda **settings: right(**{**settings, **change(settings)}))
    (case,) = [case for case in cases.timm_cases() if case.family == "resnet"]
    assert problem in checks.try_case(case).problem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table_passes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compatibility.py"])
    assert compatibility.main() == 0
