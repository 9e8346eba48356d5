"""The ``term`` argument of callbacks: an object that the user made or wrote in YAML, its name and its key."""

import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_plugins._checks import nearest
from lightning_plugins.functional.spectrum import at_least_float32, full_precision
from lightning_plugins.regularizers import EmbeddingTerm


@runtime_checkable
class GradientTerm(Protocol):
    """A term of weights that knows its gradient."""

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value, of shape ``(...)``, and the gradient of matrices of shape ``(..., m, n)``."""


def check_term(term: Any, *, example: str, known: tuple[str, ...]) -> Any:
    """Return ``term`` if it can be called or knows its gradient.

    Args:
        term: The argument's value.
        example: What to write, for the message.
        known: Names of this package's terms, for the message about a string.

    Returns:
        ``term``, unchanged.

    Raises:
        TypeError: If it is a class, a string, or neither of both.
    """
    if isinstance(term, type):
        raise TypeError(f"`term` must be an object, got the class {term.__name__}; make one, as `{term.__name__}(...)`")
    if isinstance(term, str):
        near = "".join(f"; did you mean `{name}()`?" for name in nearest(term, known, limit=1))
        raise TypeError(f"`term` must be an object such as `{example}`, got {term!r} (str){near}")
    if not isinstance(term, GradientTerm) and not callable(term):
        raise TypeError(f"`term` must be a module such as `{example}`, got {term!r} ({type(term).__name__})")
    return term


def check_name(name: str | None, term: Any) -> str:
    """Return the name that a term is logged under, by default that of its class as in ``coding_rate``.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If ``name`` is empty or has a slash in it.
    """
    if name is None:
        words = getattr(term, "__name__", type(term).__name__)
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string, got {name!r} ({type(name).__name__})")
    if not name or "/" in name:
        raise ValueError(f"`name` must be a word without '/', since it begins the names in the log, got {name!r}")
    return name


def term_key(term: Any) -> str:
    """A description for state keys, which has no address in it: that differs in every process."""
    kind = type(term)
    if isinstance(term, nn.Module):
        return repr(term)
    name = getattr(term, "__qualname__", kind.__qualname__)
    return f"{getattr(term, '__module__', kind.__module__)}.{name}"


def value_and_gradient(term: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a term, summed over a stack of matrices, and its gradient: in closed form if the term has one.

    Args:
        term: What `check_term` lets pass.
        matrix: Tensor of shape ``(..., m, n)``.

    Returns:
        A scalar and a tensor of the shape of ``matrix``, detached, in float32 or float64.

    Raises:
        ValueError: If the gradient has another shape than the matrix.
        TypeError: If the term gives no tensor.
    """
    with full_precision(matrix):
        wide = at_least_float32(matrix.detach())
        if isinstance(term, GradientTerm):
            with torch.no_grad():
                value, gradient = term.value_and_gradient(wide)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = wide.clone().requires_grad_()
                value = term(leaf)
                if not isinstance(value, Tensor):
                    raise TypeError(f"`term` must return a tensor, got {type(value).__name__}")
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
    if gradient.shape != wide.shape:
        raise ValueError(
            f"`term` must give a gradient of the shape of the weight, {tuple(wide.shape)}, got {tuple(gradient.shape)}"
        )
    return value.detach().sum().to(wide.dtype), gradient.detach().to(wide.dtype).contiguous()


class OverProcesses(EmbeddingTerm):
    """A term of the user's own, of the rows of all processes."""

    def __init__(self, term: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._term = term

    def measure(self, rows: Tensor) -> Tensor:
        value = self._term(rows)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`term` must return a scalar tensor, got {shown}")
        return value.reshape(())
