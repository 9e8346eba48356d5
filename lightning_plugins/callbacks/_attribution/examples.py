"""The first samples of an evaluation and their maps, for figures."""

from collections.abc import Mapping

from torch import Tensor

Example = tuple[Tensor, dict[str, Tensor], Tensor | None]


class Examples:
    """Keeps the first samples on the CPU.

    Args:
        limit: How many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: list[Example] = []

    def add(self, inputs: Tensor, maps: Mapping[str, Tensor], masks: Tensor | None) -> None:
        """Keep those of a batch that there is still room for."""
        for number in range(min(len(inputs), self.limit - len(self.kept))):
            own = {name: value[number].detach().float().cpu() for name, value in maps.items()}
            mask = None if masks is None else masks[number].cpu()
            self.kept.append((inputs[number].detach().float().cpu(), own, mask))
