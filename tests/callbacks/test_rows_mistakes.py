"""Mistakes in pools, masks, selections and layouts are named, with the nearest right choice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import Readout
from lightning_plugins.functional import pool_embeddings
from lightning_plugins.mixins import VNEMixin
from tests.callbacks.test_rows import Nests, Wrapped, only


class Makes:
    """Makes nothing that could be called."""

    def __init__(self, size: int = 1) -> None:
        self.size = size


IN_CONSTRUCTORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask": ""}, ValueError, "`mask` must be the name of an argument or entry of the batch, got ''"),
    ({"mask": True}, TypeError, "`mask` must be the name .*its position, or a callable, got bool"),
    ({"mask": torch.ones(2)}, TypeError, "`mask` must be .*got Tensor"),
    ({"mask": 0.5}, TypeError, "`mask` must be .*got float"),
    ({"mask": "nowhere.f"}, ValueError, "`mask='nowhere.f'` cannot be imported: No module named"),
    ({"mask": "math.pi"}, ValueError, "`mask='math.pi'` names float, which cannot be called"),
    ({"select": ""}, ValueError, "`select` must be an index, a key or the name of an attribute"),
    ({"select": []}, ValueError, r"`select` must be .*got \[\]"),
    ({"select": True}, TypeError, r"`select` must be .*got True \(bool\)"),
    ({"select": 0.5}, TypeError, r"`select` must be .*got 0.5 \(float\)"),
    ({"select": [0, None]}, TypeError, "`select` must be"),
    ({"layout": "NL"}, ValueError, "`layout` must have one capital letter a dimension.*got 'NL'"),
    ({"layout": "nlc"}, ValueError, "`layout` must have .*got 'nlc'"),
    ({"layout": "NNC"}, ValueError, "`layout` must have .*got 'NNC'"),
    ({"layout": "N,L,C"}, ValueError, "`layout` must have"),
    ({"layout": 3}, TypeError, r"`layout` must be a string such as 'NLC' or 'NCHW', got 3 \(int\)"),
    ({"pool": "frist"}, ValueError, "`pool` must be .*got 'frist'; did you mean 'first'"),
    ({"pool": {"class": "torch.nn.Flatten"}}, ValueError, "`pool` as a mapping must have a `class_path`"),
    ({"pool": {"class_path": "torch.nn.Flaten"}}, ValueError, "`pool='torch.nn.Flaten'` cannot be imported"),
    ({"pool": {"class_path": "torch.nn.Flatten", "init_args": {"begin": 1}}}, ValueError, "`init_args` must fit"),
    ({"pool": {"class_path": f"{__name__}.Makes"}}, ValueError, "must make something that can be called, got Makes"),
    ({"pool": {"class_path": "math.pi"}}, ValueError, "`class_path: math.pi` names float"),
    (
        {"pool": "torch.nn.Flatten"},
        ValueError,
        "names a class; give an object of it, or `class_path: torch.nn.Flatten`",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), IN_CONSTRUCTORS)
def test_constructors_name_it(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Readout(**arguments)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        return self.inner(x)


X = torch.ones(2, 4, 3)
IN_STEPS: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (Attends, (X, torch.ones(2, 4)), {"mask": "atention_mask"}, ValueError, "did you mean 'attention_mask'"),
    (Attends, (X,), {"mask": "mask", "batch": {"msk": 1}}, ValueError, "got .*msk.*did you mean 'msk'"),
    (Attends, (X,), {"mask": 3, "batch": (X, X)}, ValueError, "`mask=3` must be a position in the batch, got .*tuple"),
    (Attends, (X, torch.ones(2, 5)), {"mask": "attention_mask"}, ValueError, r"positions .*\(2, 4\), got \(2, 5\)"),
    (Attends, (X, torch.ones(3, 4)), {"mask": "attention_mask"}, ValueError, r"\(2, 4\), got \(3, 4\)"),
    (Attends, (X, torch.ones(2, 1, 4, 4)), {"mask": "attention_mask"}, ValueError, r"got \(2, 1, 4, 4\)"),
    (Attends, (X, [[1, 1]]), {"mask": "attention_mask"}, TypeError, "must be a tensor with one entry a position.*list"),
    (Attends, (X,), {"mask": lambda call: 3}, TypeError, "`mask` must return a tensor or None, got int"),
    (Attends, (X[:, 0], torch.ones(2, 4)), {"mask": "attention_mask"}, ValueError, "one entry for each of 2 rows"),
    (Attends, (X,), {"layout": "NCHW"}, ValueError, "`layout='NCHW'` must fit the tensor, which has 3 dimensions"),
    (
        Nests,
        (X[:, 0],),
        {"select": "sates"},
        ValueError,
        "must lead into 'layer'.*SimpleNamespace; did you mean 'states'",
    ),
    (Nests, (X[:, 0],), {"select": ["states", 2]}, ValueError, "there is a list of 1"),
    (Nests, (X[:, 0],), {"select": ["states", 0, "c"]}, ValueError, "there is a dict with 'a', 'b'"),
    (
        Nests,
        (X[:, 0],),
        {"select": ["states", 0]},
        TypeError,
        "must end at a tensor .*a dict with 'a', 'b'; add a step",
    ),
    (Nests, (X[:, 0],), {}, TypeError, r"'layer' gave SimpleNamespace, not a tensor.*`select`"),
]


@pytest.mark.parametrize(("kind", "inputs", "settings", "error", "message"), IN_STEPS)
def test_steps_name_it(kind: Any, inputs: Any, settings: dict[str, Any], error: type[Exception], message: str):
    model = Wrapped(kind())
    if kind is Nests:
        model.layer.inner = nn.Linear(3, 3)
    with pytest.raises(error, match=message):
        only(model, "layer", *inputs, **settings)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("pool", ["mean", "max", "cls", "first", "last", "tokens"])
def test_functions_and_the_mixin_ask_for_the_layout(pool: str, shape: tuple[int, ...]):
    for fn in (pool_embeddings, lambda x, pool: VNEMixin().vne_penalty(x, 0.1, pool=pool)):
        with pytest.raises(ValueError, match=rf"`layout` must name the {len(shape)} dimensions"):
            fn(torch.ones(shape), pool)
