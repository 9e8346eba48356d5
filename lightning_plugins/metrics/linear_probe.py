"""Scores of a linear map from features to targets on held-out groups, exact and in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins._grouping import Group, grouped
from lightning_plugins.functional.folds import assign_folds, group_normal, hash_groups, hash_rows, positive
from lightning_plugins.functional.spectrum import full_precision
from lightning_plugins.functional.tensors import check_integers, check_real
from lightning_plugins.metrics._embeddings import check_embeddings
from lightning_plugins.metrics._probe.fit import fit_probe
from lightning_plugins.metrics._probe.kept_rows import pack, smallest, sum_by_key, unpack
from lightning_plugins.metrics._probe.moments import add_rows, empty_moments, merge_moments
from lightning_plugins.metrics._probe.result import ProbeResult
from lightning_plugins.metrics._probe.settings import (
    Classifier,
    ProbeClassifier,
    ProbeSettings,
    Task,
    Weight,
    as_classifier,
    check_penalties,
)
from lightning_plugins.metrics._sums import SumMetric

_PENDING = 8192  # minimum number of pending rows before tables are compacted


class LinearProbe(SumMetric):
    """Predict targets from features by ridge regression on held-out groups, from accumulated sums alone.

    Groups (word types, patients, images) are hashed to folds and never split. Each batch is added to float64 sums of
    products per fold, shifted by the first batch's mean; the sums do not depend on the order of batches or the split
    over processes. They determine exactly the ridge regressions without each fold, for all penalties, and their errors
    on it. The penalty for a fold is chosen by cross-validation on the other folds. There is no learning rate.

    Controls are random targets, one number (for classification: one class) per group, the same for all its rows. They
    are additional columns of the same sums. A probe's score on them is due to memorisation.

    With ``weight="token"`` every row has equal weight. With ``weight="group"`` each group counts as one row, the mean
    of its rows; then one row per group is stored instead of the sums. For words these differ a lot: token weighting
    mostly measures frequent words.

    Classification accuracies cannot be computed from sums. They are measured on stored held-out rows, at most
    a ``reservoir`` of them, a random sample that does not depend on order or processes; the classifier is fitted to the
    sums of all rows (``"ridge"`` and ``"lda"``), or to the stored rows (``"softmax"``).

    Args:
        num_features: Number of columns ``d`` of the features.
        num_targets: Number of columns of the targets, or of classes.
        task: ``"regression"`` or ``"classification"``.
        weight: ``"token"`` or ``"group"``.
        folds: Number of folds, at least 3. The sums take ``8 * (folds + 1) * (1 + d + k)**2`` bytes.
        controls: Number of random targets.
        lambdas: Penalties to choose from, like scikit-learn's ``alpha`` on standardised features; by default 17 from
            0.01 to 10^6.
        classifier: ``"ridge"``, ``"lda"`` or ``"softmax"``; or `ProbeClassifier`, which also limits the rows stored for
            measuring accuracies, by default to 10,000.
        seed: Seed of folds, controls and the sample of rows.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> x = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> probe = LinearProbe(num_features=3)
        >>> probe.update(x, x @ torch.tensor([1.0, -2.0, 0.5]).double(), groups=torch.arange(200))
        >>> round(probe.compute().r2.item(), 4)
        1.0

    Source:
        Alain and Bengio, https://arxiv.org/abs/1610.01644 (linear probes); Hewitt and Liang, EMNLP 2019 (control
        tasks); You et al., ICML 2021 (LogME); Voita and Titov, EMNLP 2020 (description length), of which blocks of
        equal size and Gaussian codes are our reading. Deriving everything from sums is ours.
    """

    higher_is_better = None
    moments: Tensor
    kept: list[Tensor]

    @grouped(classifier=Group(ProbeClassifier, main="kind"))
    def __init__(
        self,
        num_features: int,
        num_targets: int = 1,
        *,
        task: Task = "regression",
        weight: Weight = "token",
        folds: int = 5,
        controls: int = 1,
        lambdas: Sequence[float] | None = None,
        classifier: Classifier | ProbeClassifier = "ridge",
        seed: int = 0,
    ) -> None:
        super().__init__()
        measured = as_classifier(classifier)
        self.settings = ProbeSettings(
            num_features,
            num_targets,
            task,
            weight,
            folds,
            controls,
            check_penalties(lambdas),
            measured.kind,
            measured.reservoir,
            seed,
        )
        self.set_dtype(torch.float64)  # of the tensor sent by a process without rows
        columns = 0 if weight == "group" else self.settings.columns
        self.add_state("moments", empty_moments(folds, columns), dist_reduce_fx=merge_moments)
        # flat: a process without rows sends an empty 1-D tensor, whatever the others have
        self.add_state("kept", [], dist_reduce_fx="cat")
        self.pending = 0  # rows since the last compaction

    def update(self, features: Tensor, targets: Tensor, groups: Tensor | None = None) -> None:
        """Add the rows of one batch.

        Args:
            features: Floating tensor of shape ``(N, num_features)``; no gradient flows.
            targets: Numbers of shape ``(N,)`` or ``(N, num_targets)``; for classification classes of shape ``(N,)``.
            groups: Integers of shape ``(N,)``; by default every row is a separate group, equal rows one group.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If it has another shape, or a class is out of range.
        """
        own = self.settings
        rows = check_embeddings("features", features, own.num_features).detach().to(torch.float64)
        columns = self._target_columns(targets, len(rows))
        if groups is None:
            groups = hash_rows(features)
        check_integers("groups", groups)
        if groups.shape != (len(rows),):
            raise ValueError(f"`groups` must have shape ({len(rows)},), one for each row, got {tuple(groups.shape)}")
        fold_of_row = assign_folds(groups, own.folds, seed=own.seed)  # checks the dtype of the groups
        if not len(rows):
            return
        table = torch.cat([rows, columns, self._control_columns(groups)], dim=1)
        if own.weight == "group":
            self._keep(groups.long(), torch.cat([torch.ones_like(table[:, :1]), table], dim=1))
            return
        with full_precision(table):
            self.moments = add_rows(self.moments, table, fold_of_row)  # not in place: it may be an inference tensor
        if own.task == "classification":
            key = hash_groups(hash_rows(rows) + groups.long())
            self._keep(key, torch.cat([fold_of_row[:, None].double(), table], dim=1))

    def compute(self) -> ProbeResult:
        """Fit and evaluate the probe on the rows of all batches and processes.

        Returns:
            The results.

        Raises:
            ValueError: If the rows allow no fit: too few groups, values that are not finite, a constant target, or more
                targets than rows.
        """
        own = self.settings
        kept = unpack(self.kept, 1 + own.columns)
        if own.weight == "group":
            table = sum_by_key(kept)
            means = table.rows[:, 1:] / table.rows[:, :1]
            fold_of_row = assign_folds(table.keys, own.folds, seed=own.seed)
            moments = add_rows(empty_moments(own.folds, own.columns).to(means.device), means, fold_of_row)
            sample = torch.cat([fold_of_row[:, None].double(), means], dim=1)
        else:
            moments = self.moments
            sample = smallest(kept, own.reservoir, own.seed).rows
        return fit_probe(moments, sample, own)

    def reset(self) -> None:
        """Discard all rows."""
        super().reset()
        self.pending = 0

    def load_rows(self, moments: Tensor, kept: Tensor, pending: int) -> None:
        """Continue from the states of another probe with the same settings.

        Args:
            moments: Its ``moments``.
            kept: Its ``kept``, in one tensor.
            pending: Its ``pending``.
        """
        self.moments, self.kept, self.pending = moments, [kept], pending

    def _keep(self, keys: Tensor, rows: Tensor) -> None:
        """Store rows, and compact the stored rows once they have more than doubled."""
        blocks = [self.kept] if isinstance(self.kept, Tensor) else list(self.kept)  # a tensor after a synchronisation
        blocks.append(pack(keys, rows))
        self.pending += len(rows)
        columns = rows.shape[1]
        if self.pending > max(_PENDING, sum(map(len, blocks)) // (2 * (1 + columns))):
            everything = unpack(blocks, columns)
            if self.settings.weight == "group":
                everything = sum_by_key(everything)
            else:
                everything = smallest(everything, self.settings.reservoir, self.settings.seed)
            blocks, self.pending = [pack(*everything)], 0
        self.kept = blocks

    def _target_columns(self, targets: Tensor, rows: int) -> Tensor:
        own = self.settings
        check_real("targets", targets, "a tensor")
        if own.task == "classification":
            if targets.is_floating_point() or targets.shape != (rows,):
                raise ValueError(
                    f"`targets` must be classes: integers of shape ({rows},), got {targets.dtype} of shape "
                    f"{tuple(targets.shape)}; for numbers pass `task='regression'`"
                )
            if rows and not bool(((targets >= 0) & (targets < own.num_targets)).all()):
                raise ValueError(
                    f"`targets` must be classes below `num_targets`={own.num_targets}, got values from "
                    f"{int(targets.min())} to {int(targets.max())}"
                )
            return torch.nn.functional.one_hot(targets.long(), own.num_targets).double()
        columns = targets[:, None] if targets.ndim == 1 else targets
        if columns.shape != (rows, own.num_targets):
            raise ValueError(
                f"`targets` must have shape ({rows}, {own.num_targets}), one row for each row of `features`, got "
                f"{tuple(targets.shape)}"
            )
        return columns.detach().double()

    def _control_columns(self, groups: Tensor) -> Tensor:
        own = self.settings
        seeds = [own.seed + 1000 + number for number in range(own.controls)]
        if own.task == "classification":
            classes = [positive(hash_groups(groups, seed=seed)) % own.num_targets for seed in seeds]
            columns = [torch.nn.functional.one_hot(values, own.num_targets).double() for values in classes]
        else:
            columns = [group_normal(groups, seed=seed)[:, None] for seed in seeds]
        return torch.cat([torch.empty(len(groups), 0, dtype=torch.float64, device=groups.device), *columns], dim=1)
