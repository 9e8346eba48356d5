"""Small changes of a program, each of which its tests should notice."""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "amax": "amin",
    "amin": "amax",
    "clamp_min": "clamp_max",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: The file, relative to the checkout.
        line: Its line.
        operator: The kind of change.
        before: The program text that goes.
        after: The text in its place.
        start: Offset of the text in the file, in bytes.
        end: Offset behind it.
        nth: Number of the same change on the same text further up in the file.
    """

    path: str
    line: int
    operator: str
    before: str
    after: str
    start: int
    end: int
    nth: int = 0

    @property
    def name(self) -> str:
        """The same for the same change, also where other lines have come or gone."""
        return f"{self.path}|{self.operator}|{self.before}|{self.after}|{self.nth}"

    def applied(self, source: str) -> str:
        """The file's text with the change."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def compare(node: ast.AST) -> ast.AST | None:
    """Swap a comparison with the one beside it, or with its negation."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        node.ops = [SWAPPED[type(node.ops[0])]()]
        return node
    return None


def arithmetic(node: ast.AST) -> ast.AST | None:
    """Swap plus with minus, times with divided by."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED and not any(map(_is_sequence, ast.walk(node))):
        node.op = SWAPPED[type(node.op)]()
        return node
    return None


def _is_sequence(node: ast.AST) -> bool:
    return isinstance(node, ast.List | ast.Tuple | ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def number(node: ast.AST) -> ast.AST | None:
    """Change a number: a whole one by one, another to its double."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        node.value = node.value + 1 if isinstance(node.value, int) else (2 * node.value or 1.0)
        return node
    return None


def boolean(node: ast.AST) -> ast.AST | None:
    """Swap and with or, True with False; drop a negation."""
    if isinstance(node, ast.BoolOp):
        node.op = SWAPPED[type(node.op)]()
        return node
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
        return node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    return None


def call(node: ast.AST) -> ast.AST | None:
    """Swap a reduction with another one."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in {"min", "max", "any", "all"}:
            node.func.id = CALLS[node.func.id]
            return node
        if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            node.func.attr = CALLS[node.func.attr]
            return node
    return None


def statement(node: ast.AST) -> ast.AST | None:
    """Leave out a call or an assignment in place."""
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return ast.Pass()
    return None


def condition(node: ast.AST) -> ast.AST | None:
    """Take the other branch of a choice between two values."""
    if isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
        return node
    return None


OPERATORS: dict[str, Callable[[ast.AST], ast.AST | None]] = {
    function.__name__: function for function in (compare, arithmetic, number, boolean, call, statement, condition)
}


CHANGED = (  # kinds of nodes that an operator may change: copies of all others would take most of the time
    ast.Compare,
    ast.BinOp,
    ast.Constant,
    ast.BoolOp,
    ast.UnaryOp,
    ast.Call,
    ast.AugAssign,
    ast.Expr,
    ast.IfExp,
)


def program_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of functions, without annotations, decorators, messages, and what type checkers alone read."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            child.decorator_list, child.returns = [], None
            for argument in ast.walk(child.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        if isinstance(child, ast.AnnAssign):
            child.annotation = ast.Name("Any", ast.Load())
        if isinstance(child, ast.expr | ast.stmt) and hasattr(child, "lineno"):
            yield child
        yield from program_nodes(child)


def mutants_of(path: str, source: str) -> list[Mutant]:
    """All changes of a file.

    Args:
        path: The file, relative to the checkout.
        source: Its text.

    Returns:
        The changes, in the order of the file.
    """
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    seen = Counter[tuple[str, str, str]]()
    for node in program_nodes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = data[start:end].decode()
        for operator, change in OPERATORS.items() if isinstance(node, CHANGED) else ():
            changed = change(copy.deepcopy(node))
            if changed is not None:
                after = ast.unparse(changed)
                wrapped = after if isinstance(changed, ast.stmt | ast.Constant | ast.Call) else f"({after})"
                nth = seen[operator, before, wrapped]
                seen[operator, before, wrapped] += 1
                found.append(Mutant(path, node.lineno, operator, before, wrapped, start, end, nth))
    return found
