"""Base class of gates attached to a model to modify its weights: parameters with an inverse temperature."""

from typing import Any

from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number


class Annealed(nn.Module):
    """Parameters in a submodule of a model that act on its weights, with an inverse temperature.

    Attributes:
        beta: The inverse temperature, a buffer.
    """

    beta: Tensor

    def forward(self, x: Any) -> Any:
        """Return the input: in an ``nn.Sequential`` this module is called last.

        Args:
            x: Anything.

        Returns:
            The same.
        """
        return x

    def set_beta(self, beta: float) -> None:
        """Set the inverse temperature.

        Args:
            beta: A positive number.

        Raises:
            ValueError: If it is not positive.
        """
        if check_finite_number("beta", beta) <= 0:
            raise ValueError(f"`beta` must be positive, got {beta!r}")
        self.beta.fill_(beta)
