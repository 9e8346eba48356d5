"""Settings of the callbacks that compress: of those under a budget, and of `LowRankCompression` by phase."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_instance,
    check_positive_int,
    is_number,
    nearest,
    plain_number,
    shown,
)
from lightning_plugins.callbacks._compression.rank_search import SEARCHES, check_search_options
from lightning_plugins.callbacks._monitors.figures import check_figures
from lightning_plugins.callbacks._trainer.phases import Phase, check_phases
from lightning_plugins.callbacks._trainer.progress import check_schedule
from lightning_plugins.compression.budget.filling import ChoiceRates, ChoiceSettings
from lightning_plugins.functional.stable_rank import check_power
from lightning_plugins.schedules import Cubic, Linear, Schedule, Unit

Criterion = Literal["learned", "magnitude"]
CRITERIA: tuple[Criterion, ...] = ("learned", "magnitude")
Search = Literal["beam", "equal_ratio", "energy", "trade_off", "output_energy"]
_CALIBRATION = ("mask", "damping", "effort", "memory")


@dataclass(frozen=True, kw_only=True)
class CompressionSettings(ChoiceSettings):
    """The arguments of `HybridCompression`, and those that only one of the others has.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    cost: Literal["params", "flops"]
    phase: Phase
    figures: bool
    criterion: Criterion = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("criterion", self.criterion, CRITERIA)
        if self.blocks is not None and not self.learned:
            raise ValueError(
                f"`blocks` must be None with criterion={self.criterion!r}, since the weights of blocks say nothing of "
                f"their use, got {self.blocks!r}; choose criterion='learned'"
            )
        check_instance("phase", self.phase, Phase, "a Phase, such as Phase(begin=0.1, end=0.7)")
        self._check_rates()
        object.__setattr__(self, "budget", plain_number(self.budget))
        check_figures(self.figures)

    @property
    def learned(self) -> bool:
        """True if gradients choose."""
        return self.criterion == "learned"

    @property
    def way(self) -> Schedule:
        """Progress of the choice, from 0 to 1, as a function of training progress."""
        phase = self.phase
        if phase.schedule is not None:
            return phase.schedule
        shape = Linear if self.learned else Cubic
        return shape(0.0, 1.0, begin=phase.begin, until=phase.end, unit=phase.unit)

    def _check_rates(self) -> None:
        """Refuse rates of what this choice does without."""
        ranks = self.ranks
        uses = {"scores": self.masks, "thresholds": ranks, "beta_max": True, "refresh_every": ranks}
        uses["update_every"] = not ranks  # which only magnitudes use
        for name in [name for name, used in uses.items() if not used]:
            value = getattr(self.rates, name)
            if value != getattr(ChoiceRates(), name):
                known = ", ".join(f"`{one}`" for one, used in uses.items() if used)
                raise ValueError(f"`rates`: only {known} have an effect here, got {name}={value!r}")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a search of ranks in the middle of a training, and the data that it looks at.

    Attributes:
        method: ``"beam"``: a beam search over the score of the truncated network. ``"equal_ratio"``, ``"energy"``,
            ``"trade_off"`` and ``"output_energy"`` use the weights, or with ``calibration`` the layers' outputs.
        options: Options of the beam search, those of `lightning_plugins.compression.BeamOptions`: ``width``, ``step``,
            ``bounds``, ``reuse_activations``, ``state_file``, with which a killed search resumes; of
            ``"output_energy"``: ``relative``.
        score: Score that the beam search raises: the name of a method of the module that takes a batch, or a function
            of module and batch. It returns the mean over the batch, or a sum and a count, and depends on nothing else.
            By default the negative loss of the module's training step, whose logging is silenced meanwhile.
        data: Batches to score, best held out from training; or the name of a method of the module or datamodule that
            returns them. By default the first ``batches`` of the training data, without shuffling. All processes must
            have the same.
        batches: The largest number of batches that are scored, at least 1.
        calibration: Whether layers are truncated by their outputs on ``data``; or options of
            `lightning_plugins.compression.Calibration`.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> SearchSettings(options={"width": 2}, score="accuracy").method
        'beam'
    """

    method: Search = "beam"
    options: dict[str, Any] | None = None
    score: str | Callable[[Any, Any], Any] | None = None
    data: Any = None
    batches: int = 8
    calibration: bool | dict[str, Any] = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, SEARCHES)
        check_search_options(self.method, self.options)
        if self.score is not None and not isinstance(self.score, str) and not callable(self.score):
            raise TypeError(f"`score` must be the name of a method, a function or None, got {self.score!r}")
        data = self.data
        if data is not None and (isinstance(data, bytes | Tensor | Mapping) or not isinstance(data, Iterable)):
            raise TypeError(f"`data` must be batches, the name of a method or None, got {shown(data)}")
        object.__setattr__(self, "batches", check_positive_int("batches", self.batches))
        calibration_options(self.calibration)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """A penalty that drives weights towards their ranks; `StableRankRegularization` describes it.

    Attributes:
        weight: Strength, at least 0; 0 for none. Watch ``stable_rank/<layer>`` in the log: it must have fallen to near
            0 when the layers are split, or the split costs accuracy. If it has not, raise ``weight``.
        p: 1 drives the singular values beyond the rank to zero, 2 lowers them.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        every_n_steps: Only every n-th step carries the penalty, then n times as strong.
        on_nonfinite: ``"skip"`` leaves out a term that is NaN or infinite, ``"raise"`` raises `FloatingPointError`.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Penalty(weight=0.3, every_n_steps=4)
        Penalty(weight=0.3, p=1, schedule=None, every_n_steps=4, on_nonfinite='skip')
    """

    weight: float = 1.0
    p: Literal[1, 2] = 1
    schedule: Schedule | None = None
    every_n_steps: int = 1
    on_nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        if check_finite_number("weight", self.weight) < 0:
            raise ValueError(f"`weight` must be at least 0, got {self.weight!r}; negative values would raise the ranks")
        object.__setattr__(self, "weight", plain_number(self.weight))
        object.__setattr__(self, "p", check_power(self.p))
        check_schedule(self.schedule)
        object.__setattr__(self, "every_n_steps", check_positive_int("every_n_steps", self.every_n_steps))
        check_choice("on_nonfinite", self.on_nonfinite, ("skip", "raise"))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of the search and of the split in a training.

    Attributes:
        search_at: When the ranks are searched, in ``unit``, at least 0; fractions are at most 1.
        factorize_at: When the layers are split, in ``unit``, not before ``search_at``; None for never.
        unit: ``"fraction"`` of training, ``"steps"`` of the optimizer, or ``"epochs"``.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Timing(search_at=2, factorize_at=5, unit="epochs")
        Timing(search_at=2, factorize_at=5, unit='epochs')
    """

    search_at: float = 0.4
    factorize_at: float | None = 0.8
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        times = {"search_at": self.search_at}
        if self.factorize_at is not None:
            times["factorize_at"] = self.factorize_at
        check_phases(self.unit, **times)
        for name, time in times.items():
            object.__setattr__(self, name, plain_number(time))


def as_search(search: Search | SearchSettings) -> SearchSettings:
    """Return the settings of a search, given these or a method."""
    if isinstance(search, SearchSettings):
        return search
    check_choice("search", search, SEARCHES)
    return SearchSettings(method=search)


def as_penalty(penalty: float | Penalty) -> Penalty:
    """Return a penalty, given it or its weight.

    Raises:
        TypeError: If it is neither.
        ValueError: If the weight is negative or not finite.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if not is_number(penalty):
        raise TypeError(f"`penalty` must be a weight or a Penalty, got {shown(penalty)}")
    if check_finite_number("penalty", penalty) < 0:
        raise ValueError(
            f"`penalty`, a weight, must be at least 0, got {penalty!r}; negative values would raise the ranks"
        )
    return Penalty(weight=penalty)


def calibration_options(calibration: bool | dict[str, Any]) -> dict[str, Any]:
    """Return the options of a calibration, after checking their names.

    Raises:
        TypeError: If they are neither a bool nor a dict.
        ValueError: If an option is unknown.
    """
    if isinstance(calibration, bool):
        return {}
    if not isinstance(calibration, dict):
        raise TypeError(
            f"`calibration` must be a bool, or a dict of the options {', '.join(_CALIBRATION)}, got {calibration!r}"
        )
    for name in calibration:
        if name not in _CALIBRATION:
            near = "".join(f"; did you mean {other!r}?" for other in nearest(str(name), _CALIBRATION, limit=1))
            raise ValueError(f"`calibration` takes the options {', '.join(_CALIBRATION)}, got {name!r}{near}")
    return calibration
