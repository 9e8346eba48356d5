"""Parameters that take the place of others when a network is made smaller."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Replacement(NamedTuple):
    """A parameter that takes, alone or with others, the place of one that was removed.

    Attributes:
        parameter: The new parameter.
        carry: From a tensor of the old parameter's shape, and whether it holds squares of gradients, to one of the new
            one's shape. Called when all processes hold the same new parameters.
        entrywise: Whether ``carry`` picks entries and computes none, which is right whatever they mean.
    """

    parameter: nn.Parameter
    carry: Callable[[Tensor, bool], Tensor]
    entrywise: bool = False


Replacements = Mapping[nn.Parameter, Sequence[Replacement]]
