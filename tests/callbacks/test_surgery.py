import copy
import inspect
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plugins.callbacks._surgery.swap import operate, require_operable, require_operable_optimizers
from lightning_plugins.compression.budget.carried_state import low_rank_replacements, sliced_replacement
from lightning_plugins.compression.low_rank.layers import dense_weight, low_rank_layer
from lightning_plugins.compression.networks.replacements import Replacement
from tests._processes import run_on_ranks
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Classifier, fit, make_batches, shard

BATCHES = make_batches(6)
OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": True},
    "NAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "Rprop": {},
}
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}


class Model(Classifier):
    """Its loss adds up over ranks, although DDP averages gradients."""

    def __init__(self, *, configure: Any = None) -> None:
        super().__init__(lr=0.05)
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.configure is None else self.configure(self)


def seeded(**arguments: Any) -> Model:
    torch.manual_seed(0)
    return Model(**arguments)


class Swap(Callback):
    """Splits a layer at the start of the second epoch, and remembers what the optimizers knew before and after."""

    def __init__(self, layer: str = "backbone.2", rank: int = 2, scheme: int = 1) -> None:
        self.layer, self.rank, self.scheme = layer, rank, scheme

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        self.before, self.groups = known(trainer, pl_module), [list(o.param_groups) for o in trainer.optimizers]
        operate(trainer, pl_module, lambda: self.change(pl_module))
        self.after = known(trainer, pl_module)

    def change(self, pl_module: LightningModule) -> Any:
        dense = pl_module.get_submodule(self.layer)
        factors = low_rank_layer(dense, self.rank)
        self.A, self.B = (part.weight.detach().clone() for part in factors)
        pl_module.set_submodule(self.layer, factors)
        return low_rank_replacements(dense, factors, scheme=self.scheme)


def known(trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, Any]]:
    """State of the optimizers, by the parameters' names."""
    names = {parameter: name for name, parameter in pl_module.named_parameters()}
    states = [(names[p], state) for o in trainer.optimizers for p, state in o.state.items()]
    return {name: {key: copy.deepcopy(value) for key, value in state.items()} for name, state in states}


def expected(key: str, value: Any, A: Tensor, B: Tensor) -> tuple[Any, Any]:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value, value
    if key in SQUARES:
        return torch.einsum("or,oi->ri", B**2, value), torch.einsum("oi,ri->or", value, A**2)
    if key in {"exp_inf", "step_size"}:
        return tuple(part.sqrt() for part in expected("sum", value**2, A, B))
    return torch.einsum("or,oi->ri", B, value), torch.einsum("oi,ri->or", value, A)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_carried(name):
    def configure(model: Model) -> Any:
        return getattr(torch.optim, name)(model.parameters(), lr=0.01, **OPTIMIZERS[name])

    model, swap = seeded(configure=configure), Swap()
    (optimizer,) = fit(model, BATCHES, [swap]).optimizers
    state = swap.before["backbone.2.weight"]
    assert any(torch.is_tensor(value) and value.ndim == 2 for value in state.values())
    for key, value in state.items():
        first, second = expected(key, value, swap.A, swap.B)
        torch.testing.assert_close(swap.after["backbone.2.0.weight"][key], first)
        torch.testing.assert_close(swap.after["backbone.2.1.weight"][key], second)
    others = {"backbone.2.1.bias": "backbone.2.bias", "backbone.0.weight": "backbone.0.weight"}
    for new, old in others.items():
        torch.testing.assert_close(swap.after[new], swap.before[old], rtol=0, atol=0)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    assert set(optimizer.state) == set(model.parameters())
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert all(value.is_contiguous() for value in values)
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert len({id(step) for step in steps}) == len(steps)  # each counts for itself


@pytest.mark.parametrize("scheme", [1, 2])
def test_moments_of_convolutions_are_the_gradients_of_the_factors(scheme):
    """The reference: autograd through the product of the factors."""
    layer = nn.Conv2d(3, 5, (3, 2)).double()
    factors = low_rank_layer(layer, 4, scheme=scheme)
    gradient = torch.randn_like(layer.weight)
    wanted = torch.autograd.grad((dense_weight(*factors) * gradient).sum(), [part.weight for part in factors])
    replacements = low_rank_replacements(layer, factors, scheme=scheme)[layer.weight]
    for replacement, part, value in zip(replacements, factors, wanted, strict=True):
        assert replacement.parameter is part.weight
        torch.testing.assert_close(replacement.carry(gradient, False), value)
    squares = [torch.zeros_like(part.weight) for part in factors]  # of each entry's gradient alone
    for index in range(gradient.numel()):
        one = torch.zeros_like(gradient)
        one.view(-1)[index] = gradient.view(-1)[index]
        parts = torch.autograd.grad((dense_weight(*factors) * one).sum(), [part.weight for part in factors])
        squares = [total + part**2 for total, part in zip(squares, parts, strict=True)]
    for replacement, value in zip(replacements, squares, strict=True):
        torch.testing.assert_close(replacement.carry(gradient**2, True), value)


def two_groups(model: LightningModule) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0, "lr": 0.02}, {"params": decayed}], lr=0.05)


def scheduled(model: LightningModule) -> Any:
    optimizer = two_groups(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.05], total_steps=18)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sorted_by_name(model: LightningModule) -> Any:
    return [torch.optim.Adam([p for _, p in sorted(model.named_parameters())])], []


def with_names(model: LightningModule) -> Any:
    return torch.optim.Adam(model.named_parameters())


def by_kind_of_layer(model: LightningModule) -> Any:
    """The factors belong to another group than the layer did."""
    wide = [p for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 5 for p in m.parameters()]
    rest = [p for p in model.parameters() if all(p is not other for other in wide)]
    return torch.optim.Adam([{"params": rest}, {"params": wide, "lr": 0.5}])


@pytest.mark.parametrize("configure", [two_groups, scheduled, sorted_by_name, with_names, by_kind_of_layer])
def test_groups_are_those_of_a_fresh_module(configure):
    model, swap = seeded(configure=configure), Swap()
    trainer = fit(model, BATCHES, [swap], max_epochs=3)
    (optimizer,) = trainer.optimizers
    fresh = configure(model)
    while not isinstance(fresh, torch.optim.Optimizer):
        fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh[0]
    for group, other, before in zip(optimizer.param_groups, fresh.param_groups, swap.groups[0], strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"]))
        assert group.get("param_names") == other.get("param_names")
        assert group is before  # schedulers refer to it
        assert group["weight_decay"] == other["weight_decay"]
    if configure is scheduled:
        assert trainer.lr_scheduler_configs[0].scheduler.optimizer is optimizer
        last = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
        assert [group["lr"] for group in optimizer.param_groups] == last
        plain = fit(seeded(configure=configure), BATCHES, max_epochs=3)
        assert last == plain.lr_scheduler_configs[0].scheduler.get_last_lr()


class TwoOptimizers(Model):
    """Optimises by hand, and keeps its second optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        self.second = torch.optim.Adam(self.head.parameters())
        return torch.optim.SGD(self.backbone.parameters(), lr=0.05, momentum=0.9), self.second

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


def test_several_optimizers_and_manual_optimization():
    torch.manual_seed(0)
    model, swap = TwoOptimizers(), Swap("head", 1)
    first, second = fit(model, BATCHES, [swap]).optimizers
    assert list(map(id, first.param_groups[0]["params"])) == list(map(id, model.backbone.parameters()))
    assert list(map(id, second.param_groups[0]["params"])) == list(map(id, model.head.parameters()))
    assert model.second is second  # not the one that was made to look at the order
    for key, value in swap.before["head.weight"].items():
        torch.testing.assert_close(swap.after["head.0.weight"][key], expected(key, value, swap.A, swap.B)[0])


def by_name(model: LightningModule) -> Any:
    return torch.optim.Adam([{"params": [model.backbone[2].weight]}, {"params": model.head.parameters()}])


def test_groups_that_cannot_be_formed_again_are_kept_with_a_warning():
    model, swap = seeded(configure=by_name), Swap()
    with pytest.warns(UserWarning, match="cannot be resumed with the optimizer's state"):
        (optimizer,) = fit(model, BATCHES, [swap]).optimizers
    parameters = [model.backbone[2][0].weight, model.backbone[2][1].weight]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, parameters))


def test_state_of_another_shape_begins_afresh_with_a_warning():
    def configure(model: Model) -> Any:
        return torch.optim.Adafactor(model.parameters())

    swap = Swap()
    with pytest.warns(UserWarning, match="Adafactor starts afresh for .* 1 others"):
        fit(seeded(configure=configure), BATCHES, [swap])
    assert "backbone.2.0.weight" not in swap.after
    assert "backbone.0.weight" in swap.after


class Cut(Swap):
    """Removes two of the eight hidden units."""

    kept = torch.tensor([0, 1, 3, 4, 5, 7])

    def change(self, pl_module: LightningModule) -> Any:
        (wide, _, narrow), replacements = pl_module.backbone, {}
        for layer, name, dimension in ((wide, "weight", 0), (wide, "bias", 0), (narrow, "weight", 1)):
            old = getattr(layer, name)
            new = nn.Parameter(old.detach().index_select(dimension, self.kept))
            setattr(layer, name, new)
            replacements[old] = [sliced_replacement(new, {dimension: self.kept})]
        return replacements


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sliced(optimizer):
    model, cut = seeded(), Cut()
    model.optimizer = optimizer
    fit(model, BATCHES, [cut])
    assert len(cut.after) == 6
    for name, dimension in (("backbone.0.weight", 0), ("backbone.0.bias", 0), ("backbone.2.weight", 1)):
        for key, value in cut.before[name].items():
            wanted = value.index_select(dimension, cut.kept) if value.ndim else value
            torch.testing.assert_close(cut.after[name][key], wanted, rtol=0, atol=0)


class Dropped(Swap):
    def change(self, pl_module: LightningModule) -> Any:
        old = pl_module.head.bias
        pl_module.head.bias = None
        return {old: []} if self.told else {}


@pytest.mark.parametrize("told", [True, False])
def test_parameters_that_go_for_good_must_be_told(told):
    model, dropped = seeded(), Dropped()
    dropped.told = told
    if told:
        (optimizer,) = fit(model, BATCHES, [dropped]).optimizers
        assert set(optimizer.state) == set(model.parameters())
    else:
        with pytest.raises(RuntimeError, match=r"without naming their replacements: \['head.bias'\]"):
            fit(model, BATCHES, [dropped])


class Exchange(Swap):
    """Puts copies in the place of parameters: the training must not notice."""

    def change(self, pl_module: LightningModule) -> Any:
        self.replaced, replacements = weakref.ref(pl_module.trainer.strategy.model), {}
        for module in pl_module.modules():
            for name, old in list(module._parameters.items()):
                setattr(module, name, nn.Parameter(old.detach().clone()))
                replacements[old] = [Replacement(getattr(module, name), lambda state, squared: state)]
        return replacements


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("configure", [scheduled, sorted_by_name, None])
def test_the_training_goes_on_as_if_nothing_had_happened(configure, settings):
    model, expected = seeded(configure=configure), seeded(configure=configure)
    fit(model, BATCHES, [Exchange()], max_epochs=3, **settings)
    fit(expected, BATCHES, max_epochs=3, **settings)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_a_compiled_module_is_compiled_anew():
    model, expected = seeded(), seeded()
    fit(torch.compile(model, backend="aot_eager"), BATCHES, [Swap()])
    fit(expected, BATCHES, [Swap()])
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    torch.testing.assert_close(weights, dict(expected.state_dict()))


RANKS_RUN = {"split": Swap, "exchanged": Exchange}


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    act_as_rank(rank, world_size)
    mine, results = shard(BATCHES, BOUNDS[world_size]), {}
    for name, kind in RANKS_RUN.items():
        model, callback = seeded(configure=scheduled), kind()
        fit(model, mine, [callback], strategy="ddp", devices=world_size, max_epochs=3)
        results[name] = dict(model.state_dict())
    results["let go"] = callback.replaced() is None
    return results


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    ranks = run_on_ranks(on_ranks, 2, tmp_path, 2)
    for name, kind in RANKS_RUN.items():
        model = seeded(configure=scheduled)
        fit(model, BATCHES, [kind()], max_epochs=3)
        torch.testing.assert_close(ranks[0][name], dict(model.state_dict()), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ranks[1][name], ranks[0][name], rtol=0, atol=0)
    assert all(rank["let go"] for rank in ranks)  # the wrapper that was replaced, with its hooks on parameters


def test_what_is_used_of_lightning_is_there():
    """A change of these internals must be noticed here, and not by a training that hangs."""
    strategy = DDPStrategy()
    assert callable(strategy.configure_ddp)
    assert "self._setup_model(self.model)" in inspect.getsource(DDPStrategy.configure_ddp)
    assert isinstance(inspect.getattr_static(DDPStrategy, "model"), property)


REFUSED = {
    "SWA": [StochasticWeightAveraging(0.1)],
    "finetuning": [BackboneFinetuning()],
    "pruning": [ModelPruning("l1_unstructured")],
}


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_hold_on_to_parameters_are_refused(name):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=REFUSED[name])
    with pytest.raises(MisconfigurationException, match=f"Mine replaces .* {type(REFUSED[name][0]).__name__} "):
        require_operable("Mine", trainer)


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()], ids=lambda s: type(s).__name__)
def test_strategies_that_shard_are_refused(strategy, monkeypatch):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(MisconfigurationException, match=r"are sharded under .*; pass `strategy='ddp'`"):
        require_operable("Mine", trainer)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_strategies_that_hand_weights_back_are_refused(strategy):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=2, strategy=strategy)
    with pytest.raises(MisconfigurationException, match="nothing was changed; pass `strategy='ddp'` and run a script"):
        require_operable("Mine", trainer)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.ASGD])
def test_optimizers_without_moments_are_refused(kind):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.optimizers = [kind(nn.Linear(2, 2).parameters())]
    with pytest.raises(MisconfigurationException, match=f"not possible for {kind.__name__}; use SGD, AdamW"):
        require_operable_optimizers("Mine", trainer)
