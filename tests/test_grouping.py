"""Arguments that became fields of a dataclass work, and say where they went."""

import inspect
import warnings
from dataclasses import dataclass

import pytest

from lightning_plugins._deprecation import renamed
from lightning_plugins._grouping import Group, grouped


@dataclass(frozen=True)
class Phase:
    begin: float = 0.1
    end: float = 0.7


@dataclass(frozen=True)
class Search:
    method: str = "beam"
    batches: int = 8
    rate: float = 0.5


@grouped(phase=Phase, search=Group(Search, older={"search_batches": "batches"}, main="method"))
def called(first, rate=0.0, *, phase=Phase(), search="beam"):
    """Return what came."""
    return first, rate, phase, search


def test_a_field_given_as_an_argument_warns_and_counts():
    with pytest.warns(FutureWarning, match=r"`end` is a field of `phase` now: pass `phase=Phase\(end=0.6\)`") as caught:
        assert called(1, end=0.6) == (1, 0.0, Phase(end=0.6), "beam")
    assert caught[0].filename == __file__  # the line of the call


def test_several_fields_are_one_warning():
    with pytest.warns(FutureWarning, match=r"`end` and `begin` are fields .*Phase\(end=0.6, begin=0.2\)") as caught:
        assert called(1, end=0.6, begin=0.2)[2] == Phase(0.2, 0.6)
    assert len(caught) == 1


def test_a_field_with_the_name_of_an_argument_has_no_older_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(1, rate=0.3) == (1, 0.3, Phase(), "beam")


def test_a_plain_value_stands_for_the_main_field():
    with pytest.warns(FutureWarning, match=r"pass `search=Search\(method='energy', batches=2\)`"):
        assert called(1, search="energy", search_batches=2)[3] == Search("energy", 2)


def test_a_plain_value_may_be_given_by_position():
    @grouped(search=Group(Search, main="method"))
    def by_position(first, search="beam"):
        return first, search

    with pytest.warns(FutureWarning, match=r"pass `search=Search\(method='energy', batches=2\)`"):
        assert by_position(1, "energy", batches=2) == (1, Search("energy", 2))


def test_present_forms_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(1, phase=Phase(end=0.6), search=Search(batches=3)) == (1, 0.0, Phase(end=0.6), Search(batches=3))


@dataclass(frozen=True)
class Outer:
    search: str | Search = "beam"
    depth: int = 1


def test_fields_of_a_nested_dataclass_are_gathered_first():
    nested = Group(Search, main="method")

    @grouped(outer=Group(Outer, older={"batches": "search.batches"}, nested={"search": nested}))
    def around(outer=Outer()):
        return outer

    with pytest.warns(
        FutureWarning, match="pass `outer=Outer.search=Search.method='beam', batches=2, rate=0.5."
    ) as caught:
        assert around(batches=2) == Outer(Search(batches=2))
    assert len(caught) == 1
    with pytest.warns(FutureWarning):
        assert around(depth=2, search="energy", batches=2) == Outer(Search("energy", 2), depth=2)
    with pytest.warns(FutureWarning):
        assert around(search="energy") == Outer("energy")


@pytest.mark.parametrize(
    "given", [{"phase": Phase(), "end": 0.6}, {"search": Search(), "search_batches": 2}, {"phase": None, "begin": 0.2}]
)
def test_both_forms_are_refused(given):
    with pytest.raises(TypeError, match=r"is a field of `(phase|search)` now; pass `.*\(...\)` alone, got both"):
        called(1, **given)


def test_other_names_are_refused_as_ever():
    with pytest.raises(TypeError, match="'ending'"):
        called(1, ending=0.6)


def test_the_signature_has_the_groups_alone():
    assert list(inspect.signature(called).parameters) == ["first", "rate", "phase", "search"]
    assert called.__doc__ == "Return what came."


@grouped(search=Group(Search, older={"search_batches": "batches"}, main="method", new=("rate",)))
def placed(search="beam"):
    """Return what came."""
    return search


def test_a_plain_value_by_position_stands_for_the_main_field():
    with pytest.warns(FutureWarning, match=r"pass `search=Search\(method='energy', batches=2\)`"):
        assert placed("energy", search_batches=2) == Search("energy", 2)
    with pytest.raises(TypeError, match=r"pass `search=Search\(...\)` alone, got both"):
        placed(Search(), search_batches=2)


@pytest.mark.parametrize("name", ["rate", "method"])
def test_what_never_was_an_argument_is_none(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        placed(**{name: 1})


def test_nested_decorators_warn_at_the_line_of_the_call():
    @renamed(old="first")
    @grouped(phase=Phase)
    @renamed(older="rate")
    def nested(first, rate=0.0, *, phase=Phase()):
        return first, rate, phase

    with pytest.warns(FutureWarning) as caught:
        assert nested(old=1, older=2, end=0.6) == (1, 2, Phase(end=0.6))
    assert [warning.filename for warning in caught] == [__file__] * 3
