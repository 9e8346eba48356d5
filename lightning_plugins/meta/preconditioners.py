"""Preconditioners of inner gradients: base class, identity, and learned rates."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_finite_number


class Preconditioner(nn.Module):
    """Base class: turns gradients into the updates that `InnerLoop` multiplies by its learning rate and subtracts.

    Learned quantities are its own parameters. It is called inside ``torch.func.vmap``, once for all tasks: tensors have
    the shapes of the parameters, without a task dimension, and their values cannot be read. If ``forward`` has
    arguments named ``parameters`` and ``initial``, these are the adapted parameters at the step and before the first.

    Example:
        >>> class Scaled(Preconditioner):
        ...     def initialise(self, parameters, steps):
        ...         self.scale = nn.Parameter(torch.ones(steps))
        ...     def forward(self, gradients, step):
        ...         return {name: self.scale[step] * gradient for name, gradient in gradients.items()}
        >>> scaled = Scaled()
        >>> scaled.initialise({"weight": torch.zeros(2)}, steps=3)
        >>> scaled({"weight": torch.tensor([1.0, 2.0])}, 0)["weight"]
        tensor([1., 2.], grad_fn=<MulBackward0>)
    """

    initialised = False  # by an `InnerLoop`, which fixes parameter shapes and number of steps

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create the learned parameters, by default none; `InnerLoop` calls it once.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Number of inner steps in training.
        """

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return an update for each gradient, with the same name and shape.

        Args:
            gradients: Gradients of the support loss by dotted name.
            step: The inner step, from 0; may exceed the number of training steps.

        Returns:
            Updates by the same names.

        Raises:
            NotImplementedError: In this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward(gradients, step)`")


class Identity(Preconditioner):
    """Uses the plain gradient: MAML.

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400.

    Example:
        >>> Identity()({"weight": torch.tensor([1.0, 2.0])}, 0)
        {'weight': tensor([1., 2.])}
    """

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the gradients.

        Args:
            gradients: Gradients by dotted name.
            step: Has no effect.

        Returns:
            The gradients, unchanged.
        """
        return gradients


class MetaSGD(Preconditioner):
    """Multiplies every gradient entry by its own learned factor, shared by tasks and steps: Meta-SGD.

    An entry's rate is the factor times the inner loop's learning rate. For the published parametrisation, in which the
    rates themselves are learned, set the loop's ``learning_rate`` to 1 and ``initial`` to the desired rate; an
    optimizer such as Adam then changes them relatively faster.

    Args:
        initial: Initial value of the factors.

    Raises:
        TypeError: If ``initial`` is not a number.
        ValueError: If ``initial`` is not finite.

    Example:
        >>> meta_sgd = MetaSGD()
        >>> meta_sgd.initialise({"weight": torch.zeros(2)}, steps=5)
        >>> meta_sgd({"weight": torch.tensor([1.0, 2.0])}, 0)["weight"]
        tensor([1., 2.], grad_fn=<MulBackward0>)

    Source:
        Li et al., 2017, https://arxiv.org/abs/1707.09835.
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.initial = check_finite_number("initial", initial)
        self.factors = nn.ParameterDict()

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create the factors.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Has no effect.
        """
        check_arguments(MetaSGD.initialise, locals())
        for name, parameter in parameters.items():
            self.factors[key(name)] = nn.Parameter(torch.full_like(parameter, self.initial))

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Multiply the gradients by the factors.

        Args:
            gradients: Gradients by dotted name.
            step: Has no effect.

        Returns:
            Updates by the same names.
        """
        return {name: self.factors[key(name)] * gradient for name, gradient in gradients.items()}


def key(name: str) -> str:
    """A dotted name as a key of a ``ParameterDict``, which does not allow dots."""
    return name.replace(".", "/")


def few(names: Iterable[str]) -> str:
    """The first of many names."""
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (f", … ({len(listed)} in all)" if len(listed) > 5 else "")
