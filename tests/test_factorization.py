import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))  # the script imports its neighbours as it does when it is run
factorization = importlib.import_module("factorization")

TRIED = {case[1]: case for case in factorization.models()}


# A network of convolutions with groups, one of linear layers whose weights are read directly, one of transformers.
@pytest.mark.filterwarnings("ignore")  # what other people's networks warn of
@pytest.mark.parametrize("name", ["test_efficientnet", "beit_base_patch16_224", "Llama"])
def test_networks_of_others_are_split_restored_and_exported(name):
    outcome = factorization.try_model(*TRIED[name])
    assert outcome.problem == ""
    assert 0 < outcome.split <= outcome.layers
    assert outcome.export == "yes"


@pytest.mark.filterwarnings("ignore")
def test_the_checks_notice_what_is_wrong():
    def spoil(model):
        for parameter in model.parameters():
            parameter.data.mul_(1.001)

    def narrow(model):
        model.conv1 = nn.Conv2d(3, 4, 3)

    def silence(model):
        for parameter in model.parameters():
            parameter.data.zero_()

    for change, problem in ((spoil, "at full rank outputs differ"), (narrow, "RuntimeError"), (silence, "differ by 1")):
        assert problem in factorization.try_model(*TRIED["test_resnet"], change=change).problem


def test_a_network_that_cannot_be_split_is_a_problem():
    case = ("none", "none", lambda: nn.Sequential(nn.ReLU()), torch.ones(2, 2))
    assert "must match linear layers or convolutions" in factorization.try_model(*case).problem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table_passes():
    problems = {case[1]: factorization.try_model(*case).problem for case in factorization.models()}
    own = "the dense model's own output is not finite"  # which says nothing of its factors
    assert {name: problem for name, problem in problems.items() if problem and own not in problem} == {}
