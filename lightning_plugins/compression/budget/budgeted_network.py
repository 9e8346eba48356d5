"""A network whose channels, blocks and ranks are selected under a budget in training, and which is then shrunk."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.compression.budget.budget import Budget, Projection
from lightning_plugins.compression.budget.carried_state import remove_chosen
from lightning_plugins.compression.budget.filling import (
    ChoiceSettings,
    find_groups,
    largest_within,
    out_of_reach,
    rank_layers,
)
from lightning_plugins.compression.budget.projection import project
from lightning_plugins.compression.budget.score_targets import ScoreTargets, weight_norms
from lightning_plugins.compression.budget.shift import BudgetShift
from lightning_plugins.compression.channels.find import groups_to_state
from lightning_plugins.compression.gates.masks import ChannelMasks, apply_masks, masks_of, remove_masks
from lightning_plugins.compression.gates.rank_thresholds import RankThresholds
from lightning_plugins.compression.gates.segments import Means
from lightning_plugins.compression.gates.thresholds import apply_thresholds, bake, remove_thresholds, thresholds_of
from lightning_plugins.compression.networks.plain_names import computed_names
from lightning_plugins.compression.networks.replacements import Replacements


class BudgetedNetwork:
    """A model with masks on its channels and blocks, thresholds on its singular values, or both, and its cost.

    Args:
        model: The model, dense. It keeps its parameters as objects until `shrink`.
        settings: The layers to choose in, and what may be left.
        inputs: What the model takes; for ranks under ``"params"`` it is not needed.
        groups: The state of the groups of channels and blocks, where they are known.
        attach: Whether masks and thresholds are put on at once; else `attach` does it later.

    Attributes:
        untouched: Which weights stay whole although ``layers`` matches them, as a sentence; empty where they are few.
        passed_over: For modules that ``blocks`` matches and that cannot be removed the reasons.

    Raises:
        ValueError: If nothing can be compressed, or the budget cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ChoiceSettings,
        *,
        inputs: Any,
        groups: Iterable[dict[str, Any]] | None = None,
        attach: bool = True,
    ) -> None:
        self.model, self.settings = model, settings
        layers, keep, cost = settings.layers, settings.limits.keep, settings.cost
        self.groups, self.passed_over = find_groups(model, settings, inputs, groups)
        counted = inputs if cost == "flops" else None
        self._ranked = rank_layers(model, layers, keep, inputs=counted) if settings.ranks and layers else []
        self._counted: dict[str, Any] = {"target": settings.budget, "cost": cost, "inputs": counted}
        self.untouched = out_of_reach(model, settings, self.groups, self._ranked)
        self._count()
        self.masks: ChannelMasks | None = None
        self.thresholds: RankThresholds | None = None
        self.masks_are_final = False
        self.followed = True  # whether uses of the channels outside the forward pass are known
        if attach:
            self.attach()

    def _count(self) -> None:
        self.budget = Budget(self.model, self.groups, self._ranked, **self._counted)
        self._check_budget()
        self.scores = ScoreTargets(self.model, self.budget)
        self._means = Means([group.size for group in self.groups])

    def leave_out(self, names: Collection[str]) -> None:
        """Keep groups of channels whole, before masks are put on.

        Args:
            names: Their names.

        Raises:
            ValueError: If nothing is left to choose in, or the budget cannot be met without them.
        """
        self.groups = [group for group in self.groups if group.name not in names]
        if not self.groups and not self._ranked:
            raise ValueError(f"`layers` must match a layer that can lose channels, and {sorted(names)} cannot")
        self._count()

    def attach(self) -> None:
        """Attach masks and thresholds, without changing the model's outputs."""
        before = computed_names(self.model)
        self.masks = apply_masks(self.model, self.groups) if self.groups else None
        ranked, every = self._ranked, self.settings.rates.refresh_every
        self.thresholds = apply_thresholds(self.model, ranked, refresh_every=every) if ranked else None
        # Names of parameters that are computed from others now, with the names of these.
        self.renamed = {plain: own for plain, own in computed_names(self.model).items() if plain not in before}
        self.shift = BudgetShift(self.budget, self.masks, self.thresholds)
        self.be_whole()

    def be_whole(self) -> None:
        """Make the model compute exactly the same as without masks and thresholds."""
        if self.masks is not None:
            self.masks.set_hard()
        self.bypass()

    def bypass(self, bypass: bool = True) -> None:
        """Choose whether weights bypass the thresholds.

        Args:
            bypass: Whether they do.
        """
        if self.thresholds is not None:
            self.thresholds.bypass = bypass

    def be_soft(self, beta: float) -> None:
        """Let masks and thresholds act, with gradients.

        Args:
            beta: The inverse temperature.
        """
        if self.masks is not None:
            self.masks.set_hard(False)
            self.masks.set_beta(beta)
        self.bypass(False)
        if self.thresholds is not None:
            self.thresholds.set_beta(beta)

    def be_hard(self, kept: Sequence[Tensor]) -> None:
        """Let masks be zeros and ones, and thresholds act.

        Args:
            kept: For every group which units stay.
        """
        if self.masks is not None:
            self.masks.set_kept(list(kept))
            self.masks_are_final = True
        self.bypass(False)

    def parameters(self) -> list[nn.Parameter]:
        """The scores, then the thresholds."""
        return [parameter for part in self.kinds() for parameter in part]

    def kinds(self) -> list[list[nn.Parameter]]:
        """The scores of channels, those of blocks, and the thresholds, each if there are any."""
        scores = [] if self.masks is None else list(zip(self.groups, self.masks.scores, strict=True))
        parts = [[score for group, score in scores if bool(group.block) is whole] for whole in (False, True)]
        parts.append([] if self.thresholds is None else list(self.thresholds.values))
        return [part for part in parts if part]

    def begin(self) -> None:
        """Let scores begin at the norms of their channels' weights, with a mean of 2: masks are nearly open."""
        self.scores.begin(self.shift)

    def follow_saliency(self, unscale: Tensor | None = None) -> None:
        """Move scores to the saliency of their channels; see `ScoreTargets`.

        Args:
            unscale: What gradients that no optimizer of the user's has are multiplied by.
        """
        self.scores.follow(self.shift, unscale)

    def spectra(self) -> list[Tensor]:
        """The singular values by which thresholds act, in rising order, without gradients."""
        with torch.no_grad():
            return [] if self.thresholds is None else [step.spectrum() for step in self.thresholds._steps]

    def share(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of the cost that masks and soft ranks leave, and these ranks; see `Budget.soft_share`."""
        masks = None if self.masks is None else self.masks.values()
        ranks = {} if self.thresholds is None else self.thresholds.soft_ranks()
        return self.budget.soft_share(masks, ranks), {name: rank.detach() for name, rank in ranks.items()}

    def kept(self) -> list[Tensor]:
        """Return the units that stay so far: those with positive scores, or all of them."""
        if self.masks is None:
            return [torch.ones(group.size, dtype=torch.bool) for group in self.groups]
        return self.masks.kept()

    def kept_shares(self, kept: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The share of units that stay, by group.

        Args:
            kept: Which stay; by default those with positive scores.

        Returns:
            Scalars.
        """
        shares = self._means.of(torch.cat(list(self.kept() if kept is None else kept)).float()) if self.groups else ()
        return {group.name: share for group, share in zip(self.groups, shares, strict=True)}

    def choose(self) -> Projection:
        """Choose units and ranks by the present scores and thresholds, within the budget.

        Where the budget leaves room, it is filled with the best of the channels whose scores are below zero.

        Returns:
            The choice.
        """
        kept = [] if self.masks is None else [keep.cpu() for keep in self.masks.kept()]
        ranks, margins = (None, None) if self.thresholds is None else self._ranks()
        scores = [] if self.masks is None else [score.detach().cpu() for score in self.masks.scores]
        if kept and not self.masks_are_final:
            filled = largest_within(self.budget, scores, ranks, self.budget.limit)
            kept = [one | other for one, other in zip(kept, filled, strict=True)]
        return self._project(kept, scores, ranks, margins)

    def choose_heaviest(self, share: float) -> Projection:
        """The channels with the largest weights that fit into a share of the cost.

        Args:
            share: The share, at least that of the budget.

        Returns:
            The choice.
        """
        full, scores = self.budget.limit, weight_norms(self.model, self.groups)
        self.budget.limit = max(full, int(share * self.budget.dense))
        try:
            kept = largest_within(self.budget, scores, None, self.budget.limit)
            return self._project(kept, scores)
        finally:
            self.budget.limit = full

    def _ranks(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        if self.thresholds is None:
            return {}, {}
        # On the scale of the scores, by which all that is to stay can be compared.
        margins = {name: margin / float(self.shift.exchange) for name, margin in self.thresholds.margins().items()}
        return {name: max(1, int((margin > 0).sum())) for name, margin in margins.items()}, margins

    def _project(self, *chosen: Any) -> Projection:
        least, step = self.settings.limits.min_size, self.settings.limits.multiple_of
        return project(self.budget, *chosen, min_channels=least, multiple_of=step)

    def _check_budget(self) -> None:
        nothing = [torch.zeros(group.size, dtype=torch.bool) for group in self.groups]
        scores = [torch.zeros(group.size) for group in self.groups]
        least = dict.fromkeys(self.budget.ranks, 1)
        margins = {name: torch.zeros(1) for name in least}
        try:
            self._project(nothing, scores, least, margins)
        except ValueError as error:
            raise ValueError(str(error).replace("`budget.target`", "`budget`")) from None

    def remove(self) -> None:
        """Take masks and thresholds off, those that are on: the model is the dense one."""
        if thresholds_of(self.model) is not None:
            remove_thresholds(self.model)
        if masks_of(self.model) is not None:
            remove_masks(self.model)

    def bake(self, choice: Projection) -> None:
        """Write masks and thresholds into the weights, and take them off.

        Args:
            choice: What stays.
        """
        self.be_hard(choice.kept)
        bake(self.model)

    def shrink(self, choice: Projection) -> Replacements:
        """Remove the closed units, blocks and singular values from the baked model.

        Args:
            choice: What stays.

        Returns:
            The replacements of each removed parameter.
        """
        return remove_chosen(self.model, self.groups, choice)

    def state_dict(self) -> dict[str, Any]:
        """Groups, scores and thresholds, as tensors and primitives."""
        parts = {"masks": self.masks, "thresholds": self.thresholds}
        found = {name: None if part is None else dict(part.state_dict()) for name, part in parts.items()}
        attached = self.masks is not None or self.thresholds is not None
        shifted = {"exchange": self.shift.exchange, "total": self.shift.total} if attached else None
        own = {"groups": groups_to_state(self.groups), "final": self.masks_are_final, "attached": attached}
        return {**found, **own, "shift": shifted, "scores": self.scores.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: From `state_dict`.
        """
        for name, part in (("masks", self.masks), ("thresholds", self.thresholds)):
            if part is not None:
                part.load_state_dict(state[name])
        self.masks_are_final = state["final"]
        self.scores.load_state_dict(state.get("scores"), self.masks)
        if state.get("shift") is not None:
            self.shift.exchange.copy_(state["shift"]["exchange"])
            self.shift.total.copy_(state["shift"]["total"])
