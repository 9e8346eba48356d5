"""Every public name, called with one wrong argument, does its work or says which argument is wrong."""

import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fuzzing
from tests.fuzzing import WRONG, Recorded, call, copied, is_named, like, public, recorded

# It rings an alarm in its own process and takes memory away from it: not beside tests that others wait for.
pytestmark = pytest.mark.slow

NAMES = public()
EXAMPLES = 25
SECONDS = 0.5  # what takes longer was not refused, and is at work
MEMORY = 3 * 2**30  # beyond what the process has: sizes of 1e9 fail at once instead of filling the machine
# Records that functions fill in and nobody else: they hold what they are given.
RECORDS = [name for name, value in NAMES.items() if fuzzing.is_record(value)]
SLOW = ("search.B2EASampler", "search.tune", "information.estimate", "callbacks.AttributionEvaluation")
CALLED = [name for name in NAMES if name not in RECORDS and name not in fuzzing.ALONE]


@cache
def calls(name: str) -> dict[str, Recorded]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = recorded(NAMES[name]) or fuzzing.made(name, NAMES[name])
    return {method: known for method, known in found.items() if fuzzing.parameters(known)}


class Late(BaseException):
    """An alarm: no error of what is called."""


@contextmanager
def bounded() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Late:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def annotated(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation's own types, at and beyond the bounds."""
    if get_origin(kind) in {Union, UnionType}:
        return st.one_of(*map(annotated, get_args(kind)))
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    numbers = {
        int: st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 2**31, 2**63]),
        float: st.floats() | st.sampled_from([0.0, 1.0, 5e-324, 1e308]),
    }
    return numbers.get(kind, st.none() if kind is not str else st.text(max_size=3))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CALLED])
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_wrong_argument_is_named(name: str, data: st.DataObject):
    known = data.draw(st.sampled_from(list(calls(name).values())))
    wrong = data.draw(st.sampled_from(fuzzing.parameters(known)))
    right = known.arguments[wrong.name]
    arguments = {key: copied(value) for key, value in known.arguments.items()}
    made = st.sampled_from([*WRONG.values(), *like(right).values()]).map(lambda make: make())
    arguments[wrong.name] = data.draw(made | annotated(wrong.annotation), label=f"{name}: {wrong.name}")
    torch.manual_seed(0)
    try:
        with bounded():
            call(known, arguments)
    except Exception as error:
        names = [parameter.name for one in calls(name).values() for parameter in one.signature.parameters.values()]
        if not is_named(error, names):
            raise


def test_every_public_name_is_called():
    assert [name for name in CALLED if not calls(name)] == []


def test_what_is_no_named_error_is_found_out():
    assert not is_named(AttributeError("'NoneType' object has no attribute 'shape'"), ["weight"])
    assert not is_named(ValueError("weight must be positive"), ["weight"])
    assert not is_named(RuntimeError("`weight` must be positive"), ["weight"])
    assert is_named(ValueError("`weight` must be positive, got 0"), ["weight"])
