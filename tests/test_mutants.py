"""Faults are planted in one place each, what notices them is found, and a run goes on where it was cut short."""

import ast
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))  # the script imports its neighbour as it does when it is run
mutants = importlib.import_module("mutants")
operators = importlib.import_module("mutation_operators")
mirrors = importlib.import_module("mutation_mirrors")

CHANGES = [
    ("compare", "return a < b", "return (a <= b)"),
    ("compare", "return a is None", "return (a is not None)"),
    ("compare", "return a not in b", "return (a in b)"),
    ("arithmetic", "return a + b", "return (a - b)"),
    ("arithmetic", "return a * b", "return (a / b)"),
    ("number", "return 3", "return 4"),
    ("number", "return 0.5", "return 1.0"),
    ("number", "return 0.0", "return 1.0"),
    ("boolean", "return a and b", "return (a or b)"),
    ("boolean", "return not a", "return (a)"),
    ("boolean", "return f(a, keep=True)", "return f(a, keep=False)"),
    ("call", "return min(a, b)", "return max(a, b)"),
    ("call", "return a.sum(1).b", "return a.mean(1).b"),
    ("statement", "a.append(b)", "pass"),
    ("statement", "a += b", "pass"),
    ("condition", "return a if c else b", "return (b if c else a)"),
]
LEFT_ALONE = [
    '"""Text with 3 < 4."""',
    "raise ValueError(f'{a + b} and {not a}')",
    "assert a < b",
    "return a",
    "return f'{a + 1}'",
    "x: Literal[1, 2] = a",
    "return [a] + b",
    "return a + 'text'",
]


def body(line):
    return f"def f(a, b, c):\n    {line}\n"


@pytest.mark.parametrize(("operator", "before", "after"), CHANGES)
def test_an_operator_changes_one_place(operator, before, after):
    found = [mutant.applied(body(before)) for mutant in operators.mutants_of("x.py", body(before))]
    assert body(after) in found
    of_kind = [mutant for mutant in operators.mutants_of("x.py", body(before)) if mutant.operator == operator]
    assert body(after) in [mutant.applied(body(before)) for mutant in of_kind]
    for text in found:
        ast.parse(text)
        assert text != body(before)


@pytest.mark.parametrize("line", LEFT_ALONE)
def test_messages_annotations_and_texts_are_left_alone(line):
    assert operators.mutants_of("x.py", body(line)) == []


def test_signs_beyond_ascii_do_not_move_the_place():
    source = "def f(a):\n    'β is a Greek letter'; b = 'ü'; return a < 1\n"
    texts = {mutant.operator: mutant.applied(source) for mutant in operators.mutants_of("x.py", source)}
    assert texts["compare"].endswith("return (a <= 1)\n")
    assert texts["number"].endswith("return a < 2\n")


def test_names_stay_where_lines_come_and_go():
    source = body("return a < b") + body("return a < b")
    names = [mutant.name for mutant in operators.mutants_of("x.py", source)]
    assert len(set(names)) == len(names) == 2
    assert [mutant.name for mutant in operators.mutants_of("x.py", "# a comment\n\n" + source)] == names


def test_the_order_is_spread_over_operators_and_folders():
    root = TOOLS.parent
    order = mutants.drawn(root, 0)
    first = order[:140]
    assert set(Counter(mutant.operator for mutant in first).values()) == {20}
    assert len({mutants.folder_of(mutant.path) for mutant in first}) >= 14
    assert len({mutant.name for mutant in order}) == len(order)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("lightning_plugins/functional/entropy.py", "tests/functional/test_entropy.py"),
        ("lightning_plugins/metrics/uniformity.py", "tests/metrics/test_uniformity.py"),
        ("lightning_plugins/regularizers/embedding_term.py", "tests/regularizers/"),
        ("lightning_plugins/compression/budget/projection.py", "tests/compression/test_budget.py"),
    ],
)
def test_tests_that_mirror_a_module(path, nearest):
    found = mutants.mirrors(TOOLS.parent, path)
    assert len(found) <= 2 * mutants.MOST_FILES
    assert any(name.startswith(nearest) for name in found)


def test_tests_of_what_is_around_a_place_are_nearer():
    path = "lightning_plugins/plots/style.py"
    source = (TOOLS.parent / path).read_text()
    line = source[: source.index("bar = axes.figure.colorbar")].count("\n") + 1
    assert mirrors.definition_at(source, line) == "colour_by_step"
    assert mirrors.definition_at(source, 1) == ""
    assert "tests/plots/test_spectra.py" in mutants.mirrors(TOOLS.parent, path, line)[: mutants.MOST_FILES]


def test_users_import_a_module_by_either_form():
    found = mirrors.users_of(TOOLS.parent, "lightning_plugins/meta/loop/arguments.py")
    assert {file.name for file in found} >= {"inner_loop.py", "episode.py"}
    found = mutants.mirrors(TOOLS.parent, "lightning_plugins/meta/loop/arguments.py", 88)
    assert found[0] == "tests/meta/test_inner_loop.py"


MODULE = """def least(a, b):
    return a if a < b else b


def largest(a, b):
    return max(a, b)
"""
TESTS = """import pytest
from lightning_plugins.part.numbers import least


def test_least():
    assert least(1, 2) == 1


def test_of_a_broken_machine():
    assert least(1, 2) == 3
"""


NUMBERS = "tests/part/test_numbers.py"


@pytest.fixture
def checkout(tmp_path):
    for folder in ("lightning_plugins/part", "tests/part"):
        (tmp_path / folder).mkdir(parents=True)
        for parent in (tmp_path / folder, (tmp_path / folder).parent):
            (parent / "__init__.py").write_text("")
    (tmp_path / "lightning_plugins/part/numbers.py").write_text(MODULE)
    (tmp_path / "tests/part/test_numbers.py").write_text(TESTS)
    return tmp_path


def test_the_order_is_the_seeds(checkout):
    orders = [[mutant.name for mutant in mutants.drawn(checkout, seed)] for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_a_run_tells_what_was_noticed_and_goes_on(checkout):
    path = checkout / "results.json"
    assert len(mutants.run(checkout, path, 1, 600.0, heavy=False)["results"]) == 1
    state = mutants.run(checkout, path, 99, 600.0, heavy=False)
    assert json.loads(path.read_text()) == state
    outcomes = {(result["before"], result["after"]): result["outcome"] for result in state["results"]}
    assert outcomes == {
        ("a < b", "(a <= b)"): "passed",  # equal numbers are not tried, and none can tell
        ("a if a < b else b", "(b if a < b else a)"): "failed",
        ("max(a, b)", "min(a, b)"): "passed",  # no test calls it
    }
    noticed = next(result for result in state["results"] if result["outcome"] == "failed")
    assert noticed["by"] == ["tests/part/test_numbers.py::test_least"]
    assert (checkout / "lightning_plugins/part/numbers.py").read_text() == MODULE
    assert mutants.run(checkout, path, 99, 600.0, heavy=False) == state  # nothing is planted twice


def test_a_fault_that_lived_is_planted_again(checkout):
    path, tests = checkout / "results.json", checkout / "tests/part/test_numbers.py"
    mutants.run(checkout, path, 99, 600.0, heavy=False)
    text = TESTS.replace("import least", "import largest, least")
    tests.write_text(f"{text}\n\n@pytest.mark.distributed\ndef test_largest():\n    assert largest(1, 2) == 2\n")
    (checkout / "lightning_plugins/part/numbers.py").write_text(MODULE.replace("a < b", "b > a"))
    results = mutants.again(checkout, path, 600.0, heavy=False)["results"]
    assert {(result["before"], result["first"], result["outcome"]) for result in results} == {
        ("a if a < b else b", "failed", "failed"),
        ("max(a, b)", "passed", "failed"),
    }  # the other one's place has gone
    assert [result["by"] for result in results if result["first"] == "passed"] == [[f"{NUMBERS}::test_largest"]]
    assert json.loads(path.read_text())["results"] == results


def test_explained_faults_are_not_planted_again(checkout):
    path = checkout / "results.json"
    state = mutants.run(checkout, path, 99, 600.0, heavy=False)
    for result in state["results"]:
        result["note"] = "" if result["outcome"] == "failed" else "explained"
    mutants.save(path, state)
    (checkout / "tests/part/test_numbers.py").unlink()
    assert mutants.again(checkout, path, 600.0, heavy=False) == state


def test_faults_that_hang_or_break_the_import_are_noticed(checkout):
    (checkout / "tests/part/test_numbers.py").write_text(
        "from lightning_plugins.part.numbers import least\n\n\n"
        "def test_least():\n    while least(1, 2) == 2:\n        pass\n"
    )
    source = (checkout / "lightning_plugins/part/numbers.py").read_text()
    flipped = next(
        m for m in operators.mutants_of("lightning_plugins/part/numbers.py", source) if m.operator == "condition"
    )
    tests = ["tests/part/test_numbers.py"]
    broken = operators.Mutant(flipped.path, 1, "none", "def", "fed", 0, 3)
    with mutants.Tests(8, heavy=False) as run_tests:
        assert mutants.plant(checkout, flipped, tests, run_tests)["outcome"] == "timeout"
    with mutants.Tests(60, heavy=False) as run_tests:
        assert mutants.plant(checkout, broken, tests, run_tests)["outcome"] == "broken"
        assert mutants.plant(checkout, flipped, [], run_tests)["outcome"] == "none"
    assert (checkout / flipped.path).read_text() == source


@pytest.mark.parametrize(("without", "outcome"), [("passed", "timeout"), ("failed", "timeout"), ("timeout", "unsure")])
def test_a_timeout_counts_only_where_the_tests_end_without_the_fault(checkout, without, outcome):
    mutant = next(iter(mutants.drawn(checkout, 0)))
    answers = iter([("timeout", []), (without, [])])
    assert mutants.plant(checkout, mutant, ["tests"], lambda *_: next(answers))["outcome"] == outcome
    assert next(answers, None) is None


def test_the_page_counts_and_names_what_was_not_noticed():
    shown = {"path": "lightning_plugins/meta/x.py", "line": 7, "operator": "compare", "before": "a | b", "after": "c"}
    results = [
        {**shown, "outcome": outcome, "note": ""} for outcome in ("failed", "timeout", "broken", "passed", "none")
    ]
    results[3]["note"] = "equal either way"
    results[0]["first"] = "passed"
    text = mutants.page({"seed": 3, "results": results})
    assert "Faults drawn with seed 3" in text
    assert "first planted | 2 of 5 (40%) |" in text
    assert "written for the others | 3 of 5 (60%) |" in text
    assert "noticed or explained | 4 of 5 (80%) |" in text
    assert "| compare | 5 | 3 |" in text
    assert "| meta | 5 | 3 |" in text
    assert "## Not noticed: 2, of which 1 are explained" in text
    assert "| 4 | `meta/x.py`, line 7 | `a \\| b` | `c` | equal either way |" in text
    assert "| 5 | `meta/x.py`, line 7 | `a \\| b` | `c` | open |" in text
    assert mutants.page({"seed": 3, "results": []}).startswith("# Planted faults")
