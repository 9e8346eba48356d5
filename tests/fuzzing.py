"""Calls of all public names: recorded from the examples of their docstrings, then made with one wrong argument."""

import contextlib
import copy
import doctest
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_plugins
from lightning_plugins import compression, data, information, meta

METHODS = ("__call__", "__getitem__")
CALLED = ("", "__init__", "forward", "update")  # which others call in the name of a user


class Recorded(NamedTuple):
    """A call that works: of a function, a constructor, or a method (with its object)."""

    function: Callable[..., Any]
    signature: inspect.Signature
    arguments: dict[str, Any]


def public() -> dict[str, Any]:
    """Classes and functions in the ``__all__`` of a public package, each once."""
    found: dict[int, tuple[str, Any]] = {}
    for info in pkgutil.walk_packages(lightning_plugins.__path__, "lightning_plugins."):
        if not info.ispkg or "._" in info.name:
            continue
        package = importlib.import_module(info.name)
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{info.name.removeprefix('lightning_plugins.')}.{name}", value))
    return dict(found.values())


def _functions(value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    if not inspect.isclass(value):
        yield "", value
        return
    yield "__init__", value.__init__
    for name in dir(value):
        function = inspect.getattr_static(value, name)
        hook = hasattr(LightningModule, name) or hasattr(Callback, name)  # which Lightning calls, not a user
        if inspect.isfunction(function) and (name in METHODS or not (hook or name.startswith("_"))):
            yield name, function


def recorded(value: Any) -> dict[str, Recorded]:
    """The first call of each function of ``value`` in the examples of its docstrings, arguments copied."""
    mixin = value.__module__.startswith("lightning_plugins.mixins")
    maker = type(value.__name__, (value, LightningModule), {}) if mixin else value
    codes: dict[CodeType, tuple[str, Callable[..., Any]]] = {}
    for name, function in _functions(value):
        inner = inspect.unwrap(function)
        if inspect.isfunction(inner) and inner.__module__.startswith("lightning_plugins"):
            codes.setdefault(inner.__code__, (name, maker if name == "__init__" else function))
    calls: dict[str, Recorded] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        name, function = codes.get(frame.f_code, ("", None))
        if event != "call" or function is None or name in calls:
            return
        if name and not isinstance(frame.f_locals.get("self"), value):
            return
        if name == "__init__" and type(frame.f_locals["self"]) is not value and not mixin:
            return  # of a subclass
        if name not in CALLED and "<doctest" not in frame.f_back.f_code.co_filename:
            return  # by another method: what it is given was checked there
        signature = inspect.signature(inspect.unwrap(function if name != "__init__" else value.__init__))
        if name == "__init__":
            signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        given = {key: copied(frame.f_locals[key]) for key in signature.parameters}
        calls[name] = Recorded(function, signature, given)

    tests = doctest.DocTestFinder().find(value, value.__name__, module=inspect.getmodule(value))
    for test in tests:
        sys.setprofile(note)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                doctest.DocTestRunner(verbose=False).run(test, clear_globs=False)
        finally:
            sys.setprofile(None)
    return calls


def parameters(known: Recorded) -> list[inspect.Parameter]:
    """The parameters of a call that have names of their own."""
    gathered = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return [p for p in known.signature.parameters.values() if p.name != "self" and p.kind not in gathered]


def copied(value: Any) -> Any:
    """A deep copy, or the value itself where it can't be copied."""
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return value


def call(known: Recorded, arguments: dict[str, Any]) -> Any:
    """Call with the arguments."""
    positional, named = [], {}
    for name, parameter in known.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(arguments[name])
        elif parameter.kind is parameter.VAR_KEYWORD:
            named.update(arguments[name])
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = arguments[name]
        else:
            positional.append(arguments[name])
    return known.function(*positional, **named)


class Anything:
    """An object of no type that is known."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything."""


def _float8() -> torch.Tensor:
    return torch.ones(4, 4).to(torch.float8_e4m3fn)


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "text": lambda: "no such thing",
    "empty text": lambda: "",
    "bytes": lambda: b"abc",
    "a path": lambda: Path("nowhere"),
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "2.5": lambda: 2.5,
    "NaN": lambda: math.nan,
    "-inf": lambda: -math.inf,
    "1e9": lambda: 10**9,
    "-1e9": lambda: -(10**9),
    "1e30": lambda: 10**30,
    "1j": lambda: 1j,
    "empty list": list,
    "empty dict": dict,
    "empty tuple": tuple,
    "a list of None": lambda: [None],
    "a list of numbers": lambda: [0.5, math.nan],
    "a list of text": lambda: ["a", "b"],
    "a dict": lambda: {"a": None},
    "a dict of numbers": lambda: {0: 1},
    "a set": lambda: {1},
    "an object": Anything,
    "a class": lambda: Anything,
    "a function of anything": lambda: lambda *_, **__: None,
    "a module": lambda: nn.Linear(4, 4),
    "a scalar tensor": lambda: torch.tensor(0.5),
    "a vector": lambda: torch.ones(3),
    "an empty tensor": lambda: torch.ones(0, 4),
    "a matrix": lambda: torch.randn(6, 4),
    "a square": lambda: torch.eye(4),
    "a batch": lambda: torch.randn(2, 3, 4, 4),
    "NaN tensor": lambda: torch.full((4, 4), math.nan),
    "integers": lambda: torch.arange(16).reshape(4, 4),
    "labels": lambda: torch.arange(4),
    "bools": lambda: torch.ones(4, 4, dtype=torch.bool),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "float8": _float8,
    "half": lambda: torch.eye(4).half(),
    "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
    "stride 0": lambda: torch.ones(1, 1).expand(4, 4),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "numpy": lambda: np.ones((4, 4)),
    "numpy number": lambda: np.float32(0.5),
    "numpy integer": lambda: np.int64(2),
}
ALLOWED = (TypeError, ValueError, NotImplementedError, MisconfigurationException, ImportError, OSError, IndexError)


def like(right: Any) -> dict[str, Callable[[], Any]]:
    """Wrong values that begin as the right one: of another layout, dtype, device or shape."""
    if not isinstance(right, torch.Tensor) or right.is_nested or right.layout != torch.strided:
        return {}
    own: dict[str, Callable[[], Any]] = {
        "sparse like it": lambda: right.detach().to_sparse(),
        "meta like it": lambda: right.detach().to("meta"),
        "complex like it": lambda: right.detach().to(torch.complex64),
        "float8 like it": lambda: right.detach().to(torch.float8_e4m3fn),
        "double like it": lambda: right.detach().double(),
        "half like it": lambda: right.detach().half(),
        "bool like it": lambda: right.detach().bool(),
        "long like it": lambda: right.detach().long(),
        "int8 like it": lambda: right.detach().to(torch.int8),
        "NaN like it": lambda: torch.full(right.shape, math.nan),
        "infinite like it": lambda: torch.full(right.shape, math.inf),
        "one dimension more": lambda: right.detach()[None],
        "numpy like it": lambda: right.detach().numpy(),
        "list of it": lambda: [right.detach()],
        "stride 0 like it": lambda: right.detach().flatten()[0].expand(right.shape) if right.numel() else right,
        "negative like it": lambda: -right.detach() if right.dtype != torch.bool else right,
    }
    if right.ndim:
        own["one row fewer"] = lambda: right.detach()[1:]
        own["one row more"] = lambda: torch.cat([right.detach(), right.detach()[:1]])
        own["one column fewer"] = lambda: right.detach()[..., 1:]
        own["no row"] = lambda: right.detach()[:0]
        own["one row"] = lambda: right.detach()[0]
        own["transposed"] = lambda: right.detach().transpose(0, -1)
    return own


def is_named(error: BaseException, names: Iterable[str]) -> bool:
    """Tell whether the type is allowed and the message has the name of a parameter in backticks; or it is not ours."""
    if is_users(error) or "allocate" in str(error):  # whether there is room for it the allocator alone knows
        return True
    return isinstance(error, ALLOWED) and any(re.search(rf"`{name}\b", str(error)) for name in names)


def is_users(error: BaseException) -> bool:
    """Tell whether it was raised in what the caller gave: a function of the example, or a network."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = max((i for i, file in enumerate(files) if "/lightning_plugins/" in file), default=-1)
    return any("<doctest" in file or "/torch/nn/modules/" in file for file in files[own + 1 :])


def is_record(value: Any) -> bool:
    """Tell whether it only holds what functions of this package put into it, or is a base class, an error or a type."""
    if not inspect.isclass(value):
        return False
    plain = is_dataclass(value) and not hasattr(value, "__post_init__")
    return plain or issubclass(value, tuple | Exception) or inspect.isabstract(value) or value in MADE


MADE = (
    compression.ChannelMasks,
    compression.RankThresholds,
    information.Critic,
    meta.Identity,
    meta.Preconditioner,
    meta.TaskSet,
)


def _frame() -> dict[str, Any]:
    return {"points": torch.rand(9, 4), "boxes": torch.tensor([[0.5, 0.5, 0.5, 2, 2, 2, 0]]), "labels": ["Car"]}


ALONE = ("compression.rich_progress", "plots.require_matplotlib")  # without arguments
# The calls of names whose documentation has no example
MORE: dict[str, Callable[[], dict[str, Any]]] = {
    "data.KITTIFrames": lambda: {"root": "nowhere"},
    "data.SpinningSensor": dict,
    "data.frame_of": lambda: {"shapes": [], "found": data.scan([], data.SpinningSensor(beams=16, columns=64))},
    "data.prism": lambda: {"profile": [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]},
    "data.read_kitti_labels": lambda: {"path": "nowhere", "calibration": "nowhere"},
    "data.read_kitti_points": lambda: {"path": "nowhere"},
    "meta.task_sets.check_ways": lambda: {"ways": 5},
    "regularizers.Quadrature": dict,
    "search.origins": lambda: {"study": optuna.create_study()},
    "search.shared_trials": lambda: {"study": optuna.create_study(), "n_trials": 1},
    "transforms.FlipRotateScale": dict,
    "transforms.GroundTruthSampling": lambda: {"bank": data.ObjectBank.from_frames([_frame()]), "targets": {"Car": 1}},
    "transforms.PolarMix": lambda: {"frames": [_frame(), _frame()]},
}


def made(name: str, value: Any) -> dict[str, Recorded]:
    """The call of a name whose documentation has no example, with defaults for what is left out."""
    if name not in MORE:
        return {}
    signature = inspect.signature(value)
    bound = signature.bind(**MORE[name]())
    bound.apply_defaults()
    return {"": Recorded(value, signature, dict(bound.arguments))}
