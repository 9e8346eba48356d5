"""Compression under a budget in custom steps, and checkpoints of compressed networks."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_fraction, check_instance
from lightning_plugins._grouping import Group, grouped
from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice import Choice
from lightning_plugins.compression.budget.filling import ChoiceRates, ChoiceSettings, Limits
from lightning_plugins.compression.budget.shift import Multiplier
from lightning_plugins.compression.costs.layer_costs import arguments_of
from lightning_plugins.compression.structure.restore_structure import restore_structure
from lightning_plugins.mixins._packages import refuse_other_package

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where torch's DDP looks
_PARTS = ("channel_masks", "rank_thresholds")
_OLDER_LIMITS = {
    "minimum": "min_size",
    "min_channels": "min_size",
    "multiple": "multiple_of",
    "multiple_of": "multiple_of",
}


class CompressionMixin:
    """Lets a LightningModule compress itself, and load checkpoints of a compressed version.

    With it ``load_from_checkpoint`` works, and so does every Trainer's ``ckpt_path``, with or without the callback that
    compressed the network: before weights are loaded, layers are split or narrowed as in the checkpoint. It stands
    before `LightningModule` among the bases. A module with an ``on_load_checkpoint`` of its own calls
    ``super().on_load_checkpoint(checkpoint)``.

    Where the callbacks do not fit, as with manual optimization, `attach_compression` attaches masks and thresholds,
    `compression_schedule` and `compression_step` do the work of the callbacks before and after a backward pass, and
    `compress` makes the final selection and shrinks the network. See `lightning_plugins.callbacks.HybridCompression`
    for the algorithm.

    Example:
        >>> import torch
        >>> from lightning_plugins._lightning import LightningModule
        >>> from lightning_plugins.compression import factorize
        >>> class Model(CompressionMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> checkpoint = {"state_dict": factorize(Model(), {"net.0": 2}).state_dict()}
        >>> model = Model()
        >>> model.on_load_checkpoint(checkpoint)
        >>> model.load_state_dict(checkpoint["state_dict"])
        <All keys matched successfully>
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise an error for a LightningModule of the package that this process does not use."""
        super().__init_subclass__(**kwargs)
        refuse_other_package(cls, CompressionMixin)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the module the structure of the checkpoint.

        Args:
            checkpoint: A Lightning checkpoint; its weights are loaded afterwards.

        Raises:
            ValueError: If the checkpoint does not belong to this module, compressed or not.
            TypeError: If this class is not an ``nn.Module``.
        """
        if not isinstance(self, nn.Module):
            raise TypeError(f"`CompressionMixin` must be mixed into a LightningModule, got {type(self).__name__}")
        # With masks on the module has its original structure; a checkpoint of shards has no weights here.
        if _network_of(self) is None and "state_dict" in checkpoint:
            restore_structure(self, checkpoint["state_dict"], strict=False)  # as strict as `load_state_dict`
        parent: Any = super()  # LightningModule, or another mixin
        parent.on_load_checkpoint(checkpoint)

    @grouped(limits=Group(Limits, older=_OLDER_LIMITS))
    def attach_compression(
        self,
        layers: str | Sequence[str] = "*",
        *,
        budget: float,
        cost: Literal["params", "flops"] = "params",
        inputs: Any = None,
        masks: bool = True,
        ranks: bool = True,
        limits: Limits = Limits(),
        rates: ChoiceRates | None = None,
        blocks: str | Sequence[str] | None = None,
    ) -> list[nn.Parameter]:
        """Attach masks to channels and thresholds to singular values; call it before creating the optimizer and DDP.

        Args:
            layers: The layers to compress: a name, a glob, or several.
            budget: The fraction of the cost to keep.
            cost: ``"params"``, or ``"flops"`` of a forward pass of ``inputs``.
            inputs: Example inputs of the module; by default its ``example_input_array``.
            masks: Whether to select channels.
            ranks: Whether to select ranks.
            limits: Layers to keep unchanged, and possible numbers of channels and ranks.
            rates: The step sizes of scores and thresholds, by default as in the callbacks.
            blocks: Residual blocks that may be removed as a whole, in the form of ``layers``; None for none.

        Returns:
            Scores and thresholds. They are among ``self.parameters()``, but `compression_step` updates them with its
            own optimizer: exclude them from yours.

        Raises:
            ValueError: If an argument is out of its range, nothing can be compressed, or the budget cannot be met.
            TypeError: If an argument is of the wrong type, or this class is not an ``nn.Module``.
            RuntimeError: If they are already attached.

        Example:
            >>> import torch
            >>> class Net(CompressionMixin, nn.Sequential):
            ...     pass
            >>> net = Net(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
            >>> chosen = net.attach_compression("0", budget=0.5, inputs=torch.zeros(1, 8), ranks=False)
            >>> net.compression_schedule(0.5)
            >>> net(torch.randn(4, 8)).square().mean().backward()
            >>> share, _ = net.compression_step()
            >>> net.compress().cost <= 0.5 * (8 * 16 + 16 + 16 * 2 + 2)
            True
        """
        if not isinstance(self, nn.Module):
            raise TypeError(f"`CompressionMixin` must be mixed into a LightningModule, got {type(self).__name__}")
        if _network_of(self) is not None:
            raise RuntimeError("`attach_compression` has been called already; `compress` ends what it began")
        check_bool("masks", masks)
        check_bool("ranks", ranks)
        given: Any = {"limits": limits, "rates": ChoiceRates() if rates is None else rates, "blocks": blocks}
        settings = ChoiceSettings(layers=layers, budget=budget, cost=cost, masks=masks, ranks=ranks, **given)
        if not masks and not ranks and blocks is None:
            raise ValueError("`masks` or `ranks` must be True, or there is nothing to choose, got False for both")
        example = arguments_of(getattr(self, "example_input_array", None) if inputs is None else inputs)
        if example is None and (masks or blocks is not None or cost == "flops"):
            raise ValueError("`inputs` must be given where the module has no `example_input_array`, got None for both")
        if example is not None:
            check_instance("inputs", example, (Tensor, tuple, dict), "a tensor, a tuple of arguments or a dict")
        network = BudgetedNetwork(self, settings, inputs=example)
        vars(self)["_compression"] = (network, Multiplier(), Choice(network, settings.rates))
        _leave_out_of_ddp(self)
        return network.parameters()

    def compression_schedule(self, progress: float) -> None:
        """Set masks and thresholds for the current progress; call it before the forward pass.

        Args:
            progress: Progress of the selection, from 0 to 1 when `compress` ends it; the callbacks increase it linearly
                from a tenth to seven tenths of training. While it is 0 the network is the whole one: the selection
                starts at the first larger value, in a network that has learned something.

        Raises:
            ValueError: If it is not in [0, 1].
            RuntimeError: If `attach_compression` was not called.
        """
        network, _, choice = _compression_of(self)
        way = check_fraction("progress", progress)
        if way > 0 or not _is_whole(network):
            _begin(network)
            choice.act(way)

    def compression_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Update scores and thresholds to meet the budget; call it between the backward pass and the optimizer step.

        It is the same as in the callbacks: weight gradients determine the importance of channels and singular values.
        Under fp16 unscale the gradients first.

        Returns:
            The fraction of the cost that is left, a scalar, and the ranks by layer.

        Raises:
            RuntimeError: If `attach_compression` was not called.
        """
        network, _, choice = _compression_of(self)
        return choice.look() if _is_whole(network) else choice.step()

    def compression_penalty(self, beta: float) -> Tensor:
        """The loss term for the budget; deprecated.

        It lowers the cost with a multiplier, which loses accuracy at small budgets: use `compression_schedule` and
        `compression_step`, which need no loss term.

        Args:
            beta: The inverse temperature of masks and soft ranks from now on; let it rise from 1 to about 100.

        Returns:
            Scalar, with gradients to scores and thresholds. The multiplier in it grows as long as the cost is above the
            budget.

        Raises:
            RuntimeError: If `attach_compression` was not called.
        """
        network, multiplier, _ = _compression_of(self)
        warnings.warn(
            "`compression_penalty` is deprecated: call `compression_schedule(progress)` before the forward pass and "
            "`compression_step()` before the optimizer's step, as the callbacks do",
            DeprecationWarning,
            stacklevel=2,
        )
        _begin(network)
        network.be_soft(beta)
        share, _ = network.share()
        penalty: Tensor = multiplier.penalty(share, network.budget.target)
        multiplier.update(float(share.detach()), network.budget.target)
        return penalty

    def compress(self) -> Projection:
        """Make the final selection within the budget and shrink the network: parameters are replaced.

        Call ``zero_grad`` and create a new optimizer afterwards. Under DDP call it after training.

        Returns:
            The channels kept, the ranks, and the remaining cost.

        Raises:
            RuntimeError: If `attach_compression` was not called.
        """
        network, _, _ = _compression_of(self)
        _begin(network)
        choice = network.choose()
        network.bake(choice)
        network.shrink(choice)
        del vars(self)["_compression"]
        _leave_out_of_ddp(self)
        return choice


def _network_of(module: Any) -> BudgetedNetwork | None:
    found: BudgetedNetwork | None = vars(module).get("_compression", (None,))[0]
    return found


def _compression_of(module: Any) -> tuple[BudgetedNetwork, Multiplier, Choice]:
    if _network_of(module) is None:
        raise RuntimeError("`attach_compression` must be called first")
    found: tuple[BudgetedNetwork, Multiplier, Choice] = vars(module)["_compression"]
    return found


def _is_whole(network: BudgetedNetwork) -> bool:
    """Return whether no mask and no threshold acts yet."""
    masks, thresholds = network.masks, network.thresholds
    return (masks is None or masks.is_hard) and (thresholds is None or thresholds.bypass)


def _begin(network: BudgetedNetwork) -> None:
    """Initialise the scores once; if a checkpoint provides them, initialise the state that belongs to them."""
    if _is_whole(network):
        if network.thresholds is not None:  # in the weights as trained since they were attached
            if network.masks is not None:
                network.masks.set_hard(False)
            network.thresholds.measure()
        network.begin()
    elif network.masks is not None and not network.scores.targets:
        network.scores.load_state_dict(None, network.masks)


def _leave_out_of_ddp(module: Any) -> None:
    """Exclude the scores from DDP, which would wait for their gradients; `compression_step` reduces them."""
    told = vars(module).pop(_IGNORED, ())  # set by the user, or here
    tensors = (*module.named_parameters(), *module.named_buffers())
    ignored = [name for name in told if name.partition(".")[0] not in _PARTS]
    ignored += [name for name, _ in tensors if name.partition(".")[0] in _PARTS]
    if ignored:
        vars(module)[_IGNORED] = ignored
