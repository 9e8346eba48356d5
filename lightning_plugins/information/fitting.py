"""Critics fitted to pairs, with an internal validation split."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_fraction,
    check_non_negative_int,
    check_positive_int,
)
from lightning_plugins.functional.information import (
    donsker_varadhan_bound,
    infonce_bound,
    js_bound,
    mine_loss,
    nwj_bound,
    smile_bound,
)
from lightning_plugins.functional.pair_scores import candidate_bound, row_keys
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.information.critics import CRITICS, Critic, Start, make_critic

OBJECTIVES = ("infonce", "nwj", "js", "dv", "mine", "smile")
_STARTS = [Start(kind, ridge) for kind in ("standard", "normal") for ridge in (1e-3, 0.03, 0.3)] + [
    Start("standard", None)
]
_FEWEST = 8  # pairs; the standard error shows the uncertainty of an estimate from so few


@dataclass(frozen=True)
class CriticSettings:
    """Settings for fitting a critic.

    Attributes:
        objective: The objective to maximise: ``"infonce"``, ``"nwj"``, ``"js"``, ``"dv"``, ``"mine"`` or ``"smile"``.
        batch_size: Pairs per step, which are each other's candidates; at least 2.
        max_steps: Maximum number of Adam steps; 0 keeps the initialisation, the best of several Gaussian density
            ratios.
        lr: Learning rate, with cosine decay to 0.
        check_every: Steps between validations.
        patience: Validations without improvement before stopping.
        width: Hidden units of the critic's networks.
        validation: Fraction of the pairs for early stopping, in ``(0, 1)``.
        test: Fraction reserved for the estimate, in ``[0, 1)``.
        seed: Seed of the split, the networks and the batches.

    Raises:
        TypeError: If an attribute is of the wrong type.
        ValueError: If an attribute is out of its range.

    Example:
        >>> CriticSettings(objective="infonec")
        Traceback (most recent call last):
            ...
        ValueError: `objective` must be 'infonce', 'nwj', ... or 'smile', got 'infonec'; did you mean 'infonce'?
    """

    objective: str = "infonce"
    batch_size: int = 256
    max_steps: int = 2000
    lr: float = 1e-3
    check_every: int = 50
    patience: int = 6
    width: int = 128
    validation: float = 0.15
    test: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(CriticSettings, vars(self))
        check_choice("objective", self.objective, OBJECTIVES)
        if check_positive_int("batch_size", self.batch_size) < 2:
            raise ValueError("`batch_size` must be at least 2, got 1: a pair needs others as candidates")
        check_non_negative_int("max_steps", self.max_steps)
        if check_finite_number("lr", self.lr) <= 0:
            raise ValueError(f"`lr` must be positive, got {self.lr!r}")
        for name in ("check_every", "patience", "width"):
            check_positive_int(name, getattr(self, name))
        check_non_negative_int("seed", self.seed)
        validation, test = check_fraction("validation", self.validation), check_fraction("test", self.test)
        if validation == 0 or validation + test >= 1:
            raise ValueError(
                f"`validation` must be positive and leave some pairs for training, validation + test < 1, got "
                f"validation={validation!r}, test={test!r}"
            )


@dataclass(frozen=True)
class FittedCritic:
    """A critic in its best state.

    Attributes:
        critic: Scores pairs: ``critic(x, y)`` has the shape ``(n, m)``.
        validation: InfoNCE on the validation pairs, in nats, biased upwards by the selection of the best state.
        steps: Steps of the best state.
        test_rows: Indices of the pairs not used for the fit.
        history: Validation value by step.
    """

    critic: Critic
    validation: float
    steps: int
    test_rows: Tensor
    history: dict[int, float] = field(repr=False)


def fit_critic(
    x: Tensor, y: Tensor, critic: str = "separable", *, settings: CriticSettings | None = None
) -> FittedCritic:
    """Fit a critic to pairs, without affecting the caller's random generators and precision settings.

    The critic is initialised with the Gaussian density ratio, of standardised features or of their normal scores,
    whichever normalisation and ridge are best on the validation pairs; the state that is best on these pairs is kept.
    The split depends on the rows' values, not on their order; equal pairs are on the same side. If pairs share samples,
    as same-class pairs do, make the training and the test pairs from different samples.

    Args:
        x: Floating tensor of shape ``(N, d)``, ``N >= 8``.
        y: Floating tensor of shape ``(N, e)``: the partners of the rows of ``x``.
        critic: ``"separable"``, ``"bilinear"``, ``"joint"``, or ``"cosine"``, of which only the temperature is fitted.
        settings: Fit settings; None for the defaults.

    Returns:
        The critic and the rows reserved for the estimate.

    Raises:
        TypeError: If ``x`` or ``y`` is not a floating tensor.
        ValueError: If their shapes do not match, a value is not finite, or the critic is unknown.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> fitted = fit_critic(x, x + 0.5, "bilinear", settings=CriticSettings(max_steps=0))
        >>> len(fitted.test_rows), fitted.steps
        (140, 0)
    """
    check_arguments(fit_critic, locals())
    check_pairs(x, y)
    check_choice("critic", critic, CRITICS)
    chosen = CriticSettings() if settings is None else settings
    order = shuffled_rows(x, y, chosen.seed)
    test, validation = (round(len(x) * share) for share in (chosen.test, chosen.validation))
    validation = max(validation, 2)
    rows = order.split([test, validation, len(x) - test - validation])
    with _apart(x, chosen.seed):
        x, y = (part.detach().float().clone() for part in (x, y))  # avoids inference tensors
        held = x[rows[1]], y[rows[1]]
        fitted = _best_start(critic, (x[rows[2]], y[rows[2]]), held, chosen)
        state, best, steps, history = _train(fitted, (x[rows[2]], y[rows[2]]), held, chosen)
        fitted.load_state_dict(state)
    return FittedCritic(fitted.eval().requires_grad_(False), best, steps, rows[0], history)


def check_pairs(x: Tensor, y: Tensor, *, fewest: int = _FEWEST) -> None:
    """Raise an error unless these are two matrices of pairs.

    Args:
        x: Anchors.
        y: Their partners.
        fewest: The minimum number of pairs.

    Raises:
        TypeError: If one is not a floating tensor.
        ValueError: If a shape is wrong or a value not finite.
    """
    for name, part in (("x", x), ("y", y)):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = str(part.dtype) if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"`{name}` must be a floating tensor, got {kind}; convert it with `.float()`")
        check_floating(name, part)
        if part.ndim != 2 or part.shape[1] == 0:
            raise ValueError(f"`{name}` must have shape (N, d), got {tuple(part.shape)}; flatten it to a row a sample")
        if not bool(torch.isfinite(part).all()):
            bad = int((~part.isfinite()).any(dim=1).sum())
            raise ValueError(f"`{name}` must be finite, got NaN or infinity in {bad} rows")
    if len(x) != len(y):
        raise ValueError(f"`y` must have a row for each of the {len(x)} rows of `x`, got {len(y)}")
    if len(x) < fewest:
        raise ValueError(f"`x` must have at least {fewest} pairs, got {len(x)}")


def shuffled_rows(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Order pairs at random by their values, independently of their given order.

    Args:
        x: Anchors.
        y: Their partners.
        seed: Seed of the order.

    Returns:
        A permutation of the rows.
    """
    keys = row_keys(x.detach(), y.detach())
    if seed:
        salt = torch.full((len(keys), 1), float(seed), device=keys.device)
        low = (keys & 0xFFFFFF).float()[:, None]  # exact in float32
        keys = keys ^ row_keys(salt, low)
    return keys.argsort()


@contextmanager
def _apart(x: Tensor, seed: int) -> Iterator[None]:
    """Context for training within an evaluation: with gradients, in full precision, with a separate random state."""
    devices = [x.device] if x.is_cuda else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
        torch.random.fork_rng(devices=devices),
    ):
        torch.random.manual_seed(seed)
        yield


def _validate(critic: Critic, held: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        one, other = critic.encode(*held)
        value = candidate_bound(one, other, critic.score, max_anchors=1024).value
    return value if math.isfinite(value) else -math.inf


def _best_start(
    name: str, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], settings: CriticSettings
) -> Critic:
    starts = _STARTS[:1] if name == "cosine" else _STARTS
    values = []
    for start in starts:
        base = make_critic("cosine" if name == "cosine" else "bilinear", *train, start, settings.width)
        values.append(_validate(base, held))
    best = max(range(len(starts)), key=lambda i: values[i])
    return make_critic(name, *train, starts[best], settings.width)


def _train(
    critic: Critic, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], settings: CriticSettings
) -> tuple[dict[str, Tensor], float, int, dict[int, float]]:
    x, y = train
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=settings.lr)
    best, at, state = _validate(critic, held), 0, copy.deepcopy(critic.state_dict())
    history, average = {0: best}, None
    size = min(settings.batch_size, len(x))
    rows = torch.empty(0, dtype=torch.long)
    for step in range(1, settings.max_steps + 1):
        if len(rows) < size:
            rows = torch.randperm(len(x)).to(x.device)
        batch, rows = rows[:size], rows[size:]
        loss, average = _loss(critic(x[batch], y[batch]), settings.objective, average)
        optimizer.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * step / settings.max_steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 5.0)
        optimizer.step()
        if step % settings.check_every == 0 or step == settings.max_steps:
            history[step] = value = _validate(critic, held)
            if value > best:
                best, at, state = value, step, copy.deepcopy(critic.state_dict())
            elif step - at >= settings.patience * settings.check_every:
                break
    return state, best, at, history


def _loss(scores: Tensor, objective: str, average: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if objective == "mine":
        return mine_loss(scores, average)
    if objective == "smile":
        return -smile_bound(scores), None
    bounds = {"infonce": infonce_bound, "nwj": nwj_bound, "js": js_bound, "dv": donsker_varadhan_bound}
    return -bounds[objective](scores), None
