"""Groups of channels that can only be removed together, as data."""

from collections.abc import Sequence
from typing import NamedTuple

from lightning_plugins._checks import check_instance, shown


class Member(NamedTuple):
    """A dimension of a parameter or buffer that loses entries when channels are removed.

    Attributes:
        parameter: Its dotted name in the model.
        dim: The dimension.
        side: ``"out"``: it computes the channels. ``"norm"``: it scales or shifts them. ``"in"``: it reads them.
            ``"buffer"``: statistics of them.
        units: For every index of the dimension the unit of the group it belongs to; -1 where it is not of the group.
    """

    parameter: str
    dim: int
    side: str
    units: tuple[int, ...]


class ChannelGroup(NamedTuple):
    """Units of channels that many tensors have in common. A unit leaves all of them, or stays in all of them.

    Attributes:
        name: The first layer that computes the channels; ``~2`` and so on stand behind it where it has several groups.
        size: The number of units.
        members: The tensors.
        attention: The module whose heads the units are; empty where a unit is a channel.
        gate_inputs: Whether a channel of zeros is none for those who read it: not so behind an activation that does
            not map zero to zero. Then a mask has to stand on the readers' weights as well.
        block: The residual block that the only unit is, as a whole; empty for channels.
        returns: The form of what this block returns: see `Skipped`.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    attention: str = ""
    gate_inputs: bool = False
    block: str = ""
    returns: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that compute the channels."""
        names = (member.parameter.rpartition(".")[0] for member in self.members if member.side == "out")
        return tuple(dict.fromkeys(names))


class ChannelSearch(NamedTuple):
    """Result of `find_channel_groups`.

    Attributes:
        groups: The groups.
        refused: For every layer whose outputs stay whole, in all or in part, the reason.
    """

    groups: list[ChannelGroup]
    refused: dict[str, str]


def check_groups(groups: Sequence[ChannelGroup]) -> None:
    """Raise an error unless ``groups`` is a list or tuple of groups of channels.

    Raises:
        TypeError: If it is not.

    Example:
        >>> check_groups(["net.0"])
        Traceback (most recent call last):
            ...
        TypeError: `groups` must be a list of groups of channels, as `channel_groups` finds, got 'net.0' (str) in it
    """
    rule = "a list of groups of channels, as `channel_groups` finds"
    for group in check_instance("groups", groups, (list, tuple), rule):
        if not isinstance(group, ChannelGroup):
            raise TypeError(f"`groups` must be {rule}, got {shown(group)} in it")
