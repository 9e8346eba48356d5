"""A Lagrange multiplier of a cost."""

from collections.abc import Mapping

from torch import Tensor

from lightning_plugins._checks import check_finite_number


class Multiplier:
    """A Lagrange multiplier that grows while a cost is above its target, and shrinks below it.

    The penalty is ``value * gap + damping / 2 * max(gap, 0) ** 2`` with ``gap = share / target - 1``.

    Args:
        rate: What the multiplier grows by per update and unit of the gap.
        damping: The weight of the square.

    Raises:
        ValueError: If an argument is negative.

    Example:
        >>> import torch
        >>> multiplier = Multiplier(rate=0.5)
        >>> multiplier.update(0.8, target=0.4)
        0.5
        >>> multiplier.penalty(torch.tensor(0.8), target=0.4)
        tensor(1.)
    """

    def __init__(self, rate: float = 0.05, damping: float = 1.0) -> None:
        for name, value in (("rate", rate), ("damping", damping)):
            if check_finite_number(name, value) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value!r}")
        self.rate, self.damping, self.value = rate, damping, 0.0

    def penalty(self, share: Tensor, target: float) -> Tensor:
        """The term of the loss.

        Args:
            share: The share that is left, a scalar.
            target: The share that may be left.

        Returns:
            Scalar.
        """
        gap = share / target - 1
        return self.value * gap + self.damping / 2 * gap.clamp_min(0).square()

    def update(self, share: float, target: float) -> float:
        """Update with the remaining cost fraction; once per optimizer step.

        Args:
            share: The share that is left.
            target: The share that may be left.

        Returns:
            The multiplier.
        """
        self.value = max(0.0, self.value + self.rate * (share / target - 1))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The state as a primitive."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state.

        Args:
            state: From `state_dict`.
        """
        self.value = float(state["value"])
