"""Settings and results of an estimate of mutual information."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins.functional.pair_scores import BOUNDS
from lightning_plugins.information.critics import CRITICS
from lightning_plugins.information.fitting import CriticSettings

UNITS = ("nats", "bits")


@dataclass(frozen=True)
class EstimateSettings:
    """Settings of an estimate of mutual information.

    Attributes:
        critic: ``"separable"``, ``"bilinear"``, ``"joint"`` or ``"cosine"``.
        fit: Settings of its fit.
        bound: The bound evaluated on unseen pairs: ``"infonce"``, ``"nwj"``, ``"dv"`` or ``"smile"``. The first two are
            lower bounds.
        num_candidates: K; None for all unseen pairs.
        max_anchors: Maximum number of anchors; all unseen pairs remain candidates.
        clip: For ``"smile"``.
        units: ``"nats"`` or ``"bits"``, for all results.
        consistency: Whether to fit three more critics for the consistency tests.

    Raises:
        TypeError: If an attribute is of the wrong type.
        ValueError: If an attribute is out of its range.

    Example:
        >>> EstimateSettings(units="bit")
        Traceback (most recent call last):
            ...
        ValueError: `units` must be 'nats' or 'bits', got 'bit'; did you mean 'bits'?
    """

    critic: str = "separable"
    fit: CriticSettings = field(default_factory=CriticSettings)
    bound: str = "infonce"
    num_candidates: int | None = None
    max_anchors: int | None = 8192
    clip: float = 5.0
    units: str = "nats"
    consistency: bool = False

    def __post_init__(self) -> None:
        check_choice("critic", self.critic, CRITICS)
        check_choice("bound", self.bound, BOUNDS)
        check_choice("units", self.units, UNITS)
        if not isinstance(self.fit, CriticSettings):
            raise TypeError(f"`fit` must be CriticSettings, got {type(self.fit).__name__}")
        if self.num_candidates is not None and check_positive_int("num_candidates", self.num_candidates) < 2:
            raise ValueError("`num_candidates` must be at least 2, got 1: the partner would have no other beside it")
        if self.max_anchors is not None:
            check_positive_int("max_anchors", self.max_anchors)
        if isinstance(self.clip, bool) or not self.clip > 0:
            raise ValueError(f"`clip` must be positive, got {self.clip!r}")


@dataclass(frozen=True)
class MutualInformationEstimate:
    """An estimate and the quantities needed to interpret it, all in ``units``.

    Attributes:
        estimate: The value of ``bound`` on unseen pairs.
        standard_error: By a jackknife over groups of pairs, as anchors and as candidates.
        units: ``"nats"`` or ``"bits"``.
        bound: Name of the bound.
        num_candidates: K.
        ceiling: ``ln K``, which InfoNCE cannot exceed.
        self_normalization: ``ln mean exp`` of the scores of negative pairs; 0 for the log density ratio. InfoNCE leaves
            a function of the anchor undetermined, so it is meaningful only with the other bounds.
        class_ceiling: Upper limit of InfoNCE for same-class pairs; None without labels, like the next three.
        entropy: Class entropy of the unseen pairs, an upper bound on the information shared by same-class pairs.
        class_information: Class information of a calibrated linear probe, the smaller of both sides: a lower estimate
            of ``I(C; X)``, which bounds the information shared by same-class pairs.
        class_posterior: Plug-in estimate with that probe's posteriors; it has no upper limit and is not a bound.
        consistency: ``"shuffled"`` (0 expected), ``"function of y"`` (the ratio to the estimate, 1 expected) and
            ``"two copies"`` (the ratio, 2 expected, unless a ceiling is near); None if not asked for.
    """

    estimate: float
    standard_error: float
    units: str
    bound: str
    num_candidates: int
    ceiling: float
    self_normalization: float
    class_ceiling: float | None = None
    entropy: float | None = None
    class_information: float | None = None
    class_posterior: float | None = None
    consistency: dict[str, float] | None = None

    @property
    def share_of_ceiling(self) -> float:
        """The estimate over the lower of the two limits; values near 1 mean that K is too small."""
        return self.estimate / min(self.ceiling, self.class_ceiling or math.inf)

    def __str__(self) -> str:
        known = [f"ceiling {self.ceiling:.3f}"]
        names = ("class_ceiling", "entropy", "class_information", "class_posterior")
        shown = {name: getattr(self, name) for name in names}
        known.extend(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown.items() if value is not None)
        warning = "; near its ceiling: take more candidates" if self.share_of_ceiling > 0.9 else ""
        return (
            f"{self.estimate:.3f} ± {self.standard_error:.3f} {self.units} ({self.bound}, K = {self.num_candidates}, "
            f"{', '.join(known)}){warning}"
        )


def in_units(found: MutualInformationEstimate, units: str) -> MutualInformationEstimate:
    """Convert an estimate in nats.

    Args:
        found: In nats.
        units: ``"nats"`` or ``"bits"``.

    Returns:
        The same in ``units``.
    """
    if units == "nats":
        return found
    changed: dict[str, Any] = {"units": units}
    for entry in dataclasses.fields(found):
        value = getattr(found, entry.name)
        if isinstance(value, float):
            changed[entry.name] = value / math.log(2)
    return dataclasses.replace(found, **changed)
