"""The probes of several layers, made once their widths are known."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.callbacks._trainer.requirements import agreed_widths
from lightning_plugins.distributed import is_distributed
from lightning_plugins.metrics import LinearProbe, ProbeClassifier, ProbeResult

State = dict[str, dict[str, Any]]


def make_probe(width: int, options: Mapping[str, Any]) -> LinearProbe:
    """Make the probe of a layer.

    Args:
        width: The number of features.
        options: Arguments of `LinearProbe` by name, and ``reservoir``, of its `ProbeClassifier`.

    Returns:
        The probe.
    """
    own = dict(options)
    if "reservoir" in own:
        own["classifier"] = ProbeClassifier(kind=own.get("classifier", "ridge"), reservoir=own.pop("reservoir"))
    return LinearProbe(width, **own)


class LayerProbes:
    """One probe per layer.

    Args:
        options: As for `make_probe`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._probes: dict[str, LinearProbe] = {}

    def update(self, label: str, rows: Tensor, targets: Tensor, groups: Tensor) -> None:
        """Add rows of one layer.

        Raises:
            ValueError: If the layer's width changed, or rows and targets do not fit.
            TypeError: If they are of the wrong type.
        """
        if label not in self._probes:
            self._probes[label] = self._new(rows.shape[-1], rows.device)
        width = self._probes[label].settings.num_features
        if rows.shape[-1] != width:
            raise ValueError(
                f"`layers`: {label!r} gave {width} features and now {rows.shape[-1]}; choose `positions` under which "
                "the number of features does not depend on the size of the input, such as 'mean'"
            )
        try:
            self._probes[label].update(rows, targets, groups)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`layers`: {label!r}: {error}") from error

    def results(self, labels: Sequence[str], device: torch.device) -> tuple[dict[str, ProbeResult], dict[str, str]]:
        """Fit all probes to the rows of all processes, which must all ask at the same time.

        Args:
            labels: All layers, in the same order in every process.
            device: Where this process's tensors are.

        Returns:
            What was found, of the layers of which any process has seen rows; and why nothing was, of those whose rows
            allow no fit.
        """
        self._join(labels, device)
        found, failed = {}, {}
        for label in labels:
            if label in self._probes:
                try:
                    found[label] = self._probes[label].compute()
                except ValueError as error:  # the same in all processes: they see the same sums
                    failed[label] = str(error)
        return found, failed

    def reset(self) -> None:
        """Forget all rows."""
        self._probes.clear()

    def state(self) -> State:
        """The sums of this process."""
        return {label: _state(probe) for label, probe in self._probes.items()}

    def state_of_all(self, labels: Sequence[str], device: torch.device) -> State:
        """The sums of all processes, which must all ask at the same time."""
        self._join(labels, device)
        states = {}
        for label in labels:
            if label in self._probes:
                with self._probes[label].sync_context():
                    states[label] = _state(self._probes[label])
        return states

    def load_state(self, state: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        """Go on from the sums in ``state``."""
        self._probes.clear()
        for label, own in state.items():
            probe = self._new(own["num_features"], device)
            probe.load_rows(own["moments"].to(device), own["kept"].to(device), own["pending"])
            self._probes[label] = probe

    def _new(self, width: int, device: torch.device) -> LinearProbe:
        probe = make_probe(width, self._options)
        probe.to(device)
        num_targets = probe.settings.num_targets
        targets = torch.empty(0, num_targets, device=device)
        if probe.settings.task == "classification":
            targets = torch.empty(0, dtype=torch.long, device=device)
        nothing = torch.empty(0, dtype=torch.long, device=device)
        probe.update(torch.empty(0, width, device=device), targets, nothing)  # a process may have no others
        return probe

    def _join(self, labels: Sequence[str], device: torch.device) -> None:
        """Let this process take part in the sums of layers whose rows only others have seen."""
        if not is_distributed():
            return
        own = [self._probes[label].settings.num_features if label in self._probes else 0 for label in labels]
        for label, width in zip(labels, agreed_widths(labels, own), strict=True):
            if width and label not in self._probes:
                self._probes[label] = self._new(width, device)


def _state(probe: LinearProbe) -> dict[str, Any]:
    kept = probe.kept
    flat = kept if isinstance(kept, Tensor) else torch.cat([torch.empty(0, dtype=torch.float64), *map(_cpu, kept)])
    return {
        "num_features": probe.settings.num_features,
        "moments": probe.moments.detach().clone(),
        "kept": flat.detach().clone(),
        "pending": probe.pending,
    }


def _cpu(block: Tensor) -> Tensor:
    return block.cpu()
