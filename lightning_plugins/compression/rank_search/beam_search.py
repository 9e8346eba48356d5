"""Ranks for many layers at once, found by a beam search over truncated networks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_plugins._checks import check_callable, check_finite_number, check_instance, check_positive_int
from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins._grouping import grouped
from lightning_plugins.compression.costs.layer_costs import Cost
from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.compression.rank_search.levels import Beam, discarded_energies, rank_steps
from lightning_plugins.compression.rank_search.prefix_reuse import PrefixReuse
from lightning_plugins.compression.rank_search.problem import RankSearch, SearchLevel, state_problem
from lightning_plugins.compression.rank_search.scoring import CandidateScores, Score, check_batches
from lightning_plugins.compression.rank_search.search_state import SearchState
from lightning_plugins.compression.rank_search.truncation import TruncatedWeights
from lightning_plugins.weights import Scheme


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """Options of a beam search of ranks.

    Attributes:
        width: Number of rank vectors that a level starts from, at least 1.
        step: An int lowers any layer's rank by that much. A float in (0, 1) is the fraction of the selected layers'
            cost that a step removes, rounded to at least one rank, so that steps in small and large layers compare.
        bounds: Minimum and maximum score of a sample, such as ``(0, 1)`` for accuracy. Given them, children that can no
            longer win are not scored to the end.
        reuse_activations: Whether outputs of modules before the first changed layer are kept, those of one batch at a
            time. False for models that keep a state of their own in the forward pass, or to save memory.
        state_file: A JSON file that is replaced after every level. If it exists, and belongs to the same search of the
            same weights, the search resumes from it.
        calibration: Inputs of the layers, such as a `Calibration`: weights are then truncated as `factorize` with it
            truncates them.
        progress: Called with every new `SearchLevel`, on every process; see `rich_progress`.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> BeamOptions(width=2, bounds=(0, 1)).step
        0.02
    """

    width: int = 4
    step: int | float = 0.02
    bounds: tuple[float, float] | None = None
    reuse_activations: bool = True
    state_file: str | Path | None = None
    calibration: InputMoments | None = None
    progress: Callable[[SearchLevel], None] | None = None

    def __post_init__(self) -> None:
        if self.progress is not None:
            check_callable("progress", self.progress)
        check_positive_int("width", self.width)
        if isinstance(self.step, float) and not 0 < self.step < 1:
            raise ValueError(
                f"`step` must be a fraction of the cost in (0, 1), or an int of ranks, got {self.step!r}"
                + (f"; did you mean {int(self.step)}?" if self.step.is_integer() and self.step >= 1 else "")
            )
        if not isinstance(self.step, float):
            check_positive_int("step", self.step)
        if self.bounds is None:
            return
        if not isinstance(self.bounds, tuple | list) or len(self.bounds) != 2:
            raise TypeError(f"`bounds` must be the least and the largest score, such as (0, 1), got {self.bounds!r}")
        least, most = (check_finite_number("bounds", bound) for bound in self.bounds)
        if not least < most:
            raise ValueError(f"`bounds` must be the least and the largest score, such as (0, 1), got {self.bounds!r}")


@grouped(options=BeamOptions)
@renamed(ratio=Replaced("budget", share_left))
def beam_search(
    model: nn.Module,
    batches: Iterable[Any],
    score: Score,
    *,
    budget: float,
    layers: str | Sequence[str] = "*",
    cost: Cost = "params",
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    scheme: Scheme = 1,
    options: BeamOptions = BeamOptions(),
) -> RankSearch:
    """Find ranks that are within a budget of the layers' cost and keep the score high.

    Every layer starts at its break-even rank, the largest at which two factors are cheaper than the layer. At each
    level every rank vector of the beam has one child per layer, in which that layer's rank is lower by a step. The
    children are scored with truncated weights and without fine-tuning, and the best ``width`` of them are the next
    beam. A child whose step would reach the budget takes only as much of the step as that needs, and leaves the beam;
    the search ends when the beam is empty, and delivers the best of those that left. Among equal scores the one that
    discards the least energy of the weights wins. ``width=1`` is the greedy search.

    It costs much less than scoring every child from the first batch to the last, with the same result: each weight is
    decomposed once; a network runs from the first layer on in which it differs from the one before; and with ``bounds``
    a child is given up as soon as it cannot be among the best any more. The weights, the mode of the modules and the
    state of torch's random generators are restored afterwards, even after an error.

    In a process group every process scores its share of the children, on all of its ``batches``, which must be the same
    everywhere; the result is that of one process.

    Args:
        model: The network; it is put into evaluation mode for the search.
        batches: What is scored, best a held-out part of the training data: a ``DataLoader`` without shuffling, a list,
            or anything else that gives the same batches at every pass. Every level makes one pass or, with ``bounds``,
            two: a list spares the loading.
        score: Called as ``score(model, batch)``; the higher the better. It returns the mean over the batch, all
            batches counting alike, or a pair of sum and count. It may call any part of the model, and depends on the
            batch and the weights only. It runs under ``torch.no_grad``.
        budget: The share of the selected layers' cost that may be left, in (0, 1).
        layers: The layers: dotted name, glob over dotted names, or a sequence of them. Globs take linear layers and
            convolutions that `factorize` can split.
        cost: ``"params"`` for weights, ``"flops"`` for floating-point operations of a forward pass of ``inputs``.
        inputs: Input of the model for ``cost="flops"``: a tensor, a tuple of arguments or a dict of keyword arguments.
        scheme: How a convolution's kernel becomes a matrix; see `low_rank_layer`.
        options: Width and steps of the search, bounds of the score, and other options of a `BeamOptions`.

    Returns:
        The ranks, their score, the share that they leave, and the trace.

    Raises:
        ValueError: If an argument is out of its range, no layer is selected or one is not called, the budget cannot
            be met, ``batches`` differ between passes or processes, a score is not one finite number or not within
            ``bounds``, a weight is not finite, or the file belongs to another search.
        TypeError: If an argument or a score is of a wrong type.

    Example:
        >>> import torch
        >>> from torchmetrics.functional import accuracy
        >>> _ = torch.manual_seed(0)
        >>> class Net(nn.Module):  # or a LightningModule
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        ...
        ...     def forward(self, x):
        ...         return self.head(self.body(x).relu())
        >>> def score(net, batch):
        ...     x, y = batch
        ...     return accuracy(net(x), y, task="multiclass", num_classes=4)
        >>> net = Net()
        >>> batches = [(x, net(x).argmax(1)) for x in torch.randn(3, 32, 8)]
        >>> found = beam_search(net, batches, score, budget=0.5, options=BeamOptions(bounds=(0, 1)))
        >>> found.share <= 0.5, list(found.ranks)
        (True, ['body', 'head'])

    Source:
        Eo et al., Neural Networks 2023, https://arxiv.org/abs/2111.15179. Our reading: where the search starts,
        what a child is and how the last step ends.
    """
    check_callable("score", score)
    check_instance("options", options, BeamOptions, "a BeamOptions, such as BeamOptions(width=4)")
    check_batches(batches)
    problem = state_problem(model, budget, layers, cost, inputs, scheme)
    steps = rank_steps(problem, options.step)
    device = next(iter(problem.modules.values())).weight.device
    path = None if options.state_file is None else Path(options.state_file)
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        weights = stack.enter_context(TruncatedWeights(problem.modules, scheme, options.calibration))
        reuse = stack.enter_context(PrefixReuse(model, problem.modules, enabled=options.reuse_activations))
        description = {"weights": weights.fingerprint(), "layers": list(problem.names), "budget": budget}
        if options.calibration is not None:  # three digits: sums of a resumed process may differ in the last ones
            description["calibration"] = [f"{float(energy.sum()):.2e}" for energy in weights.energies]
        description |= {"costs": [list(one) for one in problem.costs], "scheme": scheme}
        description |= {"width": options.width, "steps": steps}
        state = SearchState() if path is None else SearchState.load(path, description, device)
        scores = CandidateScores(model, batches, score, weights, reuse, options.bounds)
        search = Beam(problem, steps, options.width, scores, discarded_energies(weights.energies, device), state)
        while search.beam or not state.levels:
            level = search.advance()
            if path is not None:
                state.save(path, description)
            if options.progress is not None:
                options.progress(level)
    return search.result()


@contextmanager
def rich_progress() -> Iterator[Callable[[SearchLevel], None]]:
    """A bar of the removed fraction for ``BeamOptions(progress=...)``, drawn with rich.

    Yields:
        What to pass as ``progress``.

    Raises:
        ImportError: If rich is missing.

    Example:
        >>> with rich_progress() as progress:
        ...     progress(SearchLevel(1, 0.3, 0.3, 0.9, 4, 4, 0, ()))  # doctest: +ELLIPSIS
        rank search ...
    """
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError("the bar needs rich; run `pip install 'lightning-plugins[cli]'`") from error
    columns = TextColumn("rank search"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("")

        def show(level: SearchLevel) -> None:
            text = f"{level.share:.3f} left, budget {level.budget:.3f}, score {level.score:.4f}, level {level.number}"
            done, whole = 1 - level.share, 1 - level.budget
            bar.update(task, completed=done, total=max(whole, done), description=text)

        yield show
