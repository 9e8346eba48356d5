"""The package that a mixin's LightningModule comes from."""

from lightning_plugins._lightning import PACKAGE, advice, other_package


def refuse_other_package(cls: type, mixin: type) -> None:
    """Raise an error for classes with a LightningModule of another package than the one this process uses.

    Args:
        cls: The class that is being defined.
        mixin: The mixin among its bases, for the message.

    Raises:
        TypeError: Naming both packages.
    """
    if origin := other_package(cls):
        raise TypeError(
            f"`{mixin.__name__}` works with modules of `{PACKAGE}`, got {cls.__name__} whose LightningModule comes from"
            f" `{origin}`; {advice()}"
        )
