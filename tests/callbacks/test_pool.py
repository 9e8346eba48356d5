from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plugins.callbacks import Readout, RepresentationMonitor, VNERegularization
from lightning_plugins.callbacks._rows.pool import resolve_pool
from lightning_plugins.functional.pooling import POOLS


def last_token(features: Tensor) -> Tensor:
    return features[:, -1]


class Pools:
    @staticmethod
    def first(features: Tensor) -> Tensor:
        return features[:, 0]


@pytest.mark.parametrize("name", POOLS)
def test_a_known_name_stays_a_name(name: str):
    assert resolve_pool(name) == name


@pytest.mark.parametrize(
    "pool", [last_token, Pools.first, torch.nn.Flatten(), lambda x: x], ids=["function", "method", "module", "lambda"]
)
def test_a_callable_stays_what_it_is(pool: Any):
    assert resolve_pool(pool) is pool


def test_an_import_path_becomes_what_it_names():
    assert resolve_pool("torch.nn.functional.normalize") is torch.nn.functional.normalize
    assert resolve_pool("tests.callbacks.test_pool.last_token").__name__ == "last_token"


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("means", "`pool` must be .* got 'means'; did you mean 'mean'"),
        ("torch.nowhere", "`pool='torch.nowhere'` cannot be imported.*give the dotted path of a function, or one of"),
        ("nowhere.at.all", "`pool='nowhere.at.all'` cannot be imported: No module named 'nowhere'"),
        (".mean", "`pool='.mean'` cannot be imported"),
        ("..mean", "`pool='..mean'` cannot be imported"),
        ("mean.", "`pool='mean.'` cannot be imported"),
        ("torch.pi", "`pool='torch.pi'` names float, which cannot be called"),
    ],
)
def test_what_names_nothing_callable_is_refused(pool: str, message: str):
    with pytest.raises(ValueError, match=message):
        resolve_pool(pool)


@pytest.mark.parametrize("pool", [None, 3, ["mean"]], ids=str)
def test_what_is_neither_text_nor_callable_is_refused(pool: Any):
    with pytest.raises(TypeError, match=f"a callable or its import path, got {type(pool).__name__}"):
        resolve_pool(pool)


@pytest.mark.parametrize("pool", [torch.nn.Flatten(), Pools().first, Pools.first], ids=["module", "method", "function"])
def test_every_callable_has_a_state_key(pool: Any):
    keys = [
        VNERegularization("fc", weight=0.1, readout=Readout(pool=pool)).state_key,
        RepresentationMonitor("fc", readout=Readout(pool=pool), figures=False).state_key,
    ]
    assert not any(" at 0x" in key for key in keys)  # an address would be another one after a resume
