import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from lightning_plugins.compression import (
    Calibration,
    InputMoment,
    dense_weight,
    energy_threshold,
    equal_ratio,
    factorize,
    low_rank_layer,
    output_sensitivity,
    restore_structure,
    score_ranks,
    trade_off,
    truncated,
)
from lightning_plugins.compression.calibration import moment_sums
from lightning_plugins.compression.rank_search.truncation import energies as energies_of
from tests._processes import run_on_ranks

F64 = torch.float64


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def make_rows(count: int = 5, size: int = 11, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3, width, dtype=F64)
    return [scale * torch.randn(size, width, generator=generator, dtype=F64) for _ in range(count)]


def moment_of(rows: Tensor, damping: float = 1e-12) -> InputMoment:
    return InputMoment(rows.T @ rows, len(rows), damping)


def test_moments_are_sums_over_all_rows():
    net, batches = make_net(), make_rows()
    calibration = Calibration(net, effort=None).record(batches)
    with torch.no_grad():
        hidden = net[:2](torch.cat(batches))
    for name, rows in (("0", torch.cat(batches)), ("2", hidden), ("4", net[2:4](hidden))):
        found = calibration.moment(name)
        assert found.rows == 55
        torch.testing.assert_close(found.total, rows.T @ rows)
    assert calibration.batches == 5
    assert net.training  # as it was
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(
    "form", [(3, 2, 1, 2), ((3, 2), 1, (1, 2), (1, 2)), (2, 1, "same", 1), (3, 1, "valid", 1)], ids=str
)
def test_moments_of_patches(form: Any, padding_mode: str):
    kernel, stride, padding, dilation = form
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, padding_mode=padding_mode).double()
    x = torch.randn(2, 3, 9, 8, dtype=F64)
    found = Calibration(nn.Sequential(layer), effort=None).record([x]).moment("0")
    # The output of a convolution is its kernel times the patch, for any kernel: here those that give one entry each.
    size = layer.weight[0].numel()
    probe = copy.deepcopy(layer)
    probe.weight = nn.Parameter(torch.eye(size, dtype=F64).reshape(size, *layer.weight.shape[1:]))
    probe.bias = None
    patches = probe(x).movedim(1, -1).reshape(-1, size)
    assert found.rows == len(patches)
    torch.testing.assert_close(found.total, patches.T @ patches)


def test_moments_of_a_sequence_convolution():
    layer, x = nn.Conv1d(3, 5, 3, stride=2, padding=1).double(), torch.randn(2, 3, 10, dtype=F64)
    found = Calibration(nn.Sequential(layer), effort=None).record([x]).moment("0")
    patches = F.unfold(x[:, :, None], (1, 3), padding=(0, 1), stride=(1, 2)).transpose(1, 2).reshape(-1, 9)
    torch.testing.assert_close(found.total, patches.T @ patches)


def test_a_mask_leaves_rows_out():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.pooler(self.body(x)[:, 0])

    net, mask = Net().double(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": torch.randn(2, 3, 4, dtype=F64), "attention_mask": mask}
    found = Calibration(net, mask="attention_mask", effort=None).record([batch])
    rows = batch["x"][mask.bool()]
    torch.testing.assert_close(found.moment("body").total, rows.T @ rows)
    assert (found.moment("body").rows, found.moment("pooler").rows) == (3, 2)
    whole = Calibration(net, mask=lambda batch: torch.tensor([0, 1]), effort=None).record([batch])
    assert (whole.moment("body").rows, whole.moment("pooler").rows) == (3, 1)


def test_layers_that_receive_one_tensor_share_a_sum_until_they_do_not():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.apart = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return q + self.k(2 * x if self.apart else x)

    net, x = Net().double(), torch.randn(5, 4, dtype=F64)
    calibration = Calibration(net, effort=None)
    with calibration.recording(x):
        net(x)
    assert calibration._open is not None
    assert calibration._open.result()["q"][0] is calibration._open.result()["k"][0]
    net.apart = True
    with calibration.recording(x):
        net(x)
    calibration.gather()
    torch.testing.assert_close(calibration.moment("q").total, 2 * x.T @ x)
    torch.testing.assert_close(calibration.moment("k").total, 5 * x.T @ x)


def test_a_tensor_that_is_changed_in_place_afterwards_counts_as_it_was():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            x.mul_(3)
            return y + self.two(x)

    net, x = Net().double(), torch.randn(5, 3, dtype=F64)
    moment = x.T @ x
    found = Calibration(net, effort=None).record([x.clone()])
    torch.testing.assert_close(found.moment("one").total, moment)
    torch.testing.assert_close(found.moment("two").total, 9 * moment)


def alternating(weight: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Another algorithm for the same minimum: each factor in turn by least squares on the outputs."""
    right = torch.randn(rank, weight.shape[1], dtype=F64, generator=torch.Generator().manual_seed(0))
    for _ in range(3000):
        left = weight @ metric @ right.T @ torch.linalg.inv(right @ metric @ right.T)
        right = torch.linalg.lstsq(left, weight).solution
    return left @ right


def error(weight: Tensor, small: Tensor, metric: Tensor) -> float:
    rest = (weight - small).flatten(1)
    return float(((rest @ metric) * rest).sum().detach())


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7)])
def test_no_other_algorithm_has_a_smaller_error(outputs: int, inputs: int):
    torch.manual_seed(0)
    layer, rows = nn.Linear(inputs, outputs).double(), torch.cat(make_rows(width=inputs))
    metric = rows.T @ rows
    for rank in (1, 3):
        small = dense_weight(*low_rank_layer(layer, rank, moment=moment_of(rows)))
        reference = error(layer.weight, alternating(layer.weight.detach(), metric, rank), metric)
        assert error(layer.weight, small, metric) == pytest.approx(reference, rel=1e-6)
        assert error(layer.weight, small, metric) < 0.9 * error(layer.weight, truncated(layer, rank), metric)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(9, 5),
    "tall": lambda: nn.Linear(4, 8),
    "HF Conv1D": lambda: Conv1D(6, 9),
    "Conv1d": lambda: nn.Conv1d(3, 6, 3),
    "Conv2d": lambda: nn.Conv2d(3, 6, (3, 2), stride=2, padding=1),
    "pointwise": lambda: nn.Conv2d(5, 6, 1),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    scheme=st.sampled_from([1, 2]),
    rank=st.integers(1, 4),
    samples=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_outputs_are_never_further_away_than_by_plain_truncation(
    kind: str, scheme: Any, rank: int, samples: int, seed: int
):
    if scheme == 2 and kind == "Conv1d":
        scheme = 1
    torch.manual_seed(seed)
    layer: Any = LAYERS[kind]().double()
    shape = {"wide": (9,), "tall": (4,), "HF Conv1D": (9,), "Conv1d": (3, 7), "pointwise": (5, 3, 3)}.get(
        kind, (3, 6, 5)
    )
    x = torch.randn(samples, *shape, dtype=F64) * torch.rand(shape, dtype=F64)
    calibration = Calibration(nn.Sequential(layer), effort=None, damping=1e-3).record([x])
    plain = low_rank_layer(layer, rank, scheme=scheme)
    ours = low_rank_layer(layer, rank, scheme=scheme, moment=calibration.moment("0"))
    wanted = layer(x)
    far, near = ((pair(x) - wanted).square().sum().item() for pair in (plain, ours))
    assert near <= far * (1 + 1e-7) + 1e-12


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_white_inputs_give_the_plain_truncation(kind: str, scheme: Any):
    torch.manual_seed(0)
    layer: Any = LAYERS[kind]().double()
    if scheme == 2 and isinstance(layer, nn.Conv1d):
        scheme = 1
    size = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight[0].numel()
    white = InputMoment(7 * torch.eye(size, dtype=F64), 7, 1e-2)
    ours = dense_weight(*low_rank_layer(layer, 2, scheme=scheme, moment=white))
    torch.testing.assert_close(ours, dense_weight(*low_rank_layer(layer, 2, scheme=scheme)))


@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rank_deficient_moments_give_finite_factors(rows: int, scheme: Any):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    moment = moment_of(torch.randn(rows, 36), damping=1e-2)
    pair = low_rank_layer(layer, 6, scheme=scheme, moment=moment)
    assert all(bool(p.isfinite().all()) for p in pair.parameters())
    if scheme == 1:  # at full rank it is the layer, whatever was seen
        torch.testing.assert_close(dense_weight(*pair), layer.weight, rtol=1e-4, atol=1e-5)
    again = low_rank_layer(layer, 2, scheme=scheme, moment=moment._replace(total=1e30 * moment.total))
    expected = low_rank_layer(layer, 2, scheme=scheme, moment=moment)
    torch.testing.assert_close(dense_weight(*again), dense_weight(*expected), rtol=1e-3, atol=1e-4)


def test_transposed_layers_become_two_linear_ones():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(6, 9), nn.Tanh(), Conv1D(4, 6))
    x = torch.randn(8, 9)
    small = factorize(copy.deepcopy(net), 1.0, only_if_smaller=False, calibration=Calibration(net).record([x]))
    assert all(isinstance(half, nn.Linear) for pair in (small[0], small[2]) for half in pair)
    torch.testing.assert_close(small(x), net(x))
    again = restore_structure(copy.deepcopy(net), small.state_dict())
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


def test_a_part_of_the_rows_stands_for_all():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 2)), torch.randn(4000, 8)
    found = Calibration(net, effort=1).record([x]).moment("0")  # 2 / 8 of the rows
    assert found.rows == 4000
    exact = x.T @ x
    assert not torch.equal(found.total, exact)
    assert float((found.total - exact).norm() / exact.norm()) < 0.1


def bert() -> tuple[BertModel, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=64, **sizes), add_pooling_layer=False).eval()
    mask = (torch.arange(48) < torch.tensor([[48], [30], [40], [12]])).long()
    return model, [{"input_ids": torch.randint(50, (4, 48)), "attention_mask": mask} for _ in range(3)]


def test_calibration_costs_less_than_a_third_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch):
    model, batches = bert()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            model(**batch)
    add, more = moment_sums._Sum.add, []

    def counted(self: Any, matrices: Any, weight: float, rows: int) -> None:
        more.extend(2 * len(matrix) * matrix.shape[1] ** 2 for matrix in matrices)
        add(self, matrices, weight, rows)

    monkeypatch.setattr(moment_sums._Sum, "add", counted)
    Calibration(model, mask="attention_mask").record(batches)
    assert 0 < sum(more) <= 0.3 * counter.get_total_flops()


def test_moments_of_an_encoder_make_a_better_one():
    model, batches = bert()
    calibration = Calibration(model, "encoder.*", mask="attention_mask", effort=None).record(batches)
    wanted = [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
    errors = []
    for moments in (None, calibration):
        small = factorize(copy.deepcopy(model), 0.3, "encoder.*", calibration=moments)
        found = [small(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
        errors.append(float(sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("memory", [9 * 9 * 8, 150 * 8])
def test_moments_are_within_the_memory_asked_for(memory: int):
    net, batches = make_net(), make_rows()
    held = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        square = [t for t in gc.get_objects() if type(t) is Tensor and t.ndim == 2 and t.shape[0] == t.shape[1]]
        held.append(sum(t.nbytes for t in square))
        return model(batch)

    calibration = Calibration(net, effort=None, memory=memory)
    before = sum(t.nbytes for t in gc.get_objects() if type(t) is Tensor and t.ndim == 2 and t.shape[0] == t.shape[1])
    calibration.record(batches, forward)
    assert max(held) - before <= memory
    assert len(held) == 5 * len(calibration._parts) > 5
    whole = Calibration(net, effort=None).record(batches)
    for name in calibration.layers:
        torch.testing.assert_close(calibration.moment(name).total, whole.moment(name).total)
    calibration.record(batches)  # which goes on with what is in the files
    torch.testing.assert_close(calibration.moment("2").total, 2 * whole.moment("2").total)
    assert calibration.batches == 10


def test_state_goes_on_in_another_calibration():
    net, batches = make_net(), make_rows()
    first = Calibration(net, effort=None).record(batches[:2])
    second = Calibration(net, effort=None)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.record(batches[2:])
    whole = Calibration(net, effort=None).record(batches)
    torch.testing.assert_close(second.moment("2").total, whole.moment("2").total)
    assert second.batches == 5


def test_searches_take_the_outputs_errors():
    net, batches = make_net(), make_rows()
    calibration = Calibration(net, effort=None, damping=1e-9).record(batches)
    inputs = torch.cat(batches)
    outputs = inputs @ net[0].weight.detach().T
    energies = torch.linalg.svdvals(outputs).square()
    torch.testing.assert_close(energies_of({"0": net[0]}, 1, calibration)[0][:6], energies[:6], rtol=1e-6, atol=1e-6)
    for search in (energy_threshold, trade_off):
        assert search(net, budget=0.7, calibration=calibration).share <= 0.7
    ranks = equal_ratio(net, budget=0.7).ranks

    def score(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()

    small = factorize(copy.deepcopy(net), ranks, calibration=calibration)
    expected = sum(score(small, batch).item() for batch in batches) / len(batches)
    assert score_ranks(net, ranks, batches, score, calibration=calibration) == pytest.approx(expected)


def test_sensitivity_is_the_mean_square_of_the_derivative():
    net, batches = make_net(), make_rows(2)
    found = output_sensitivity(net, batches, lambda model, x: model(x).square().sum())
    total = torch.zeros((), dtype=F64)
    for x in batches:
        hidden = net[:2](x).detach().requires_grad_()
        pre = net[2](hidden).detach().requires_grad_()
        net[3:](pre).square().sum().backward()
        total += pre.grad.square().sum()
    assert found["2"] == pytest.approx(float(total) / (2 * 11 * 7))
    for parameter in net.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    frozen = output_sensitivity(net, batches, lambda model, x: model(x).square().sum())
    assert frozen == pytest.approx(found)


def on_a_rank(rank: int) -> Any:
    net, batches = make_net(), make_rows()
    own = batches[:4] if rank == 0 else batches[4:]
    own = [batch[: 11 - 2 * rank] for batch in own]
    recorded = Calibration(net, effort=None).record(own)
    loop = Calibration(net, effort=None)
    for batch in own:
        with loop.recording(batch):
            net(batch)
    state = loop.gather().state_dict()
    nothing = Calibration(net, effort=None).record(own if rank else [])
    return recorded.state_dict(), state, recorded.batches, nothing.moment("0").rows


@pytest.mark.distributed
def test_unequal_processes_have_the_moments_of_one(tmp_path: Path):
    results = run_on_ranks(on_a_rank, 2, tmp_path)
    batches = make_rows()
    whole = Calibration(make_net(), effort=None).record([*batches[:4], batches[4][:9]]).state_dict()["found"]
    for recorded, loop, count, rows in results:
        assert (count, rows) == (5, 9)
        for name, one in whole.items():
            for state in (recorded, loop):
                assert state["found"][name]["rows"] == one["rows"]
                torch.testing.assert_close(state["found"][name]["total"], one["total"])


def once(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


X = torch.ones(2, 6, dtype=F64)
NAMED = {"x": X, "attention_mask": torch.ones(2, 6)}
MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "no batches": (lambda net: Calibration(net).record([]), ValueError, "`batches` must have at least one batch"),
    "one batch": (lambda net: Calibration(net).record(X), TypeError, "`batches` must be .*, got Tensor; put one batch"),
    "batches that are a number": (lambda net: Calibration(net).record(3), TypeError, "`batches` must be .*, got int"),
    "batches that end": (
        lambda net: Calibration(net, memory=9 * 9 * 8).record(once([X])),
        ValueError,
        "`batches` must give the same batches at every pass, of which `memory` makes 3 necessary",
    ),
    "labels among the arguments": (
        lambda net: Calibration(net).record([(X, 1)]),
        TypeError,
        "Sequential does not take a tuple .* pass `forward`",
    ),
    "forward that is none": (lambda net: Calibration(net).record([X], 3), TypeError, "`forward` must be a function"),
    "NaN": (
        lambda net: Calibration(net).record([X * float("nan")]),
        ValueError,
        "finite inputs, but '0' received NaN or infinite values",
    ),
    "not recorded": (
        lambda net: factorize(net, 0.3, calibration=Calibration(net)),
        ValueError,
        "`calibration` must have recorded",
    ),
    "never called": (
        lambda net: factorize(copy.deepcopy(u := Unused().double()), 0.3, calibration=Calibration(u).record([X])),
        ValueError,
        "'unused' was never called in 1 batches; leave it out",
    ),
    "another layer": (
        lambda net: factorize(net, 0.3, calibration=Calibration(net, "0").record([X])),
        ValueError,
        "must be of all layers that are split, but has no layer of the `name` '2'",
    ),
    "another model": (
        lambda net: factorize(
            net, 0.3, "0", calibration=Calibration(nn.Sequential(nn.Linear(4, 9)).double()).record([X[:, :4]])
        ),
        ValueError,
        r"'0' cannot be split: `calibration` must have a moment of shape \(6, 6\)",
    ),
    "mask that is a tensor": (
        lambda net: Calibration(net, mask=X),
        TypeError,
        "`mask` must be .*, got Tensor; for one",
    ),
    "mask without a name": (lambda net: Calibration(net, mask=""), ValueError, "`mask` must be the name"),
    "mask by name of a tensor": (lambda net: Calibration(net, mask="m").record([X]), TypeError, "`mask='m'` must name"),
    "mask misspelled": (
        lambda net: Calibration(net, mask="atention_mask").record([NAMED]),
        ValueError,
        "got 'atention_mask'; did you mean 'attention_mask'",
    ),
    "mask of another shape": (
        lambda net: Calibration(net, mask=lambda x: torch.ones(3)).record([X]),
        ValueError,
        r"`mask` must have the shape \(2,\) of the rows that '0' receives, .*, got \(3,\)",
    ),
    "mask to add": (
        lambda net: Calibration(net, mask=lambda x: torch.tensor([0, -torch.inf])).record([X]),
        ValueError,
        "`mask` must be 0 where .* add to attention scores",
    ),
    "mask that is no tensor": (
        lambda net: Calibration(net, mask=len).record([X]),
        TypeError,
        "`mask` must give a tensor",
    ),
    "no damping": (lambda net: Calibration(net, damping=0), ValueError, "`damping` must be more than 0"),
    "damping in percent": (lambda net: Calibration(net, damping=5), ValueError, "`damping` must be in .* mean 0.05"),
    "no effort": (lambda net: Calibration(net, effort=0), ValueError, "`effort` must be more than 0, or None"),
    "too little memory": (
        lambda net: Calibration(net, memory=100),
        ValueError,
        "`memory` must hold the moment of '2', which takes 648",
    ),
    "no model": (lambda net: Calibration([net]), TypeError, "`model` must be a torch.nn.Module"),
    "no such layer": (lambda net: Calibration(net, "7"), ValueError, "no module is called '7'"),
    "not gathered": (lambda net: in_a_loop(net).moment("0"), ValueError, "must be gathered before"),
    "record within a loop": (lambda net: in_a_loop(net).record([X]), ValueError, "`record` must follow `gather"),
    "loop in several passes": (
        lambda net: in_a_loop(net, memory=648),
        ValueError,
        "`memory` must hold the moments of all",
    ),
    "state of other layers": (
        lambda net: Calibration(net, "0").load_state_dict(Calibration(net).record([X]).state_dict()),
        ValueError,
        r"`state_dict` must be of the layers \['0'\]",
    ),
    "loss without gradient": (
        lambda net: output_sensitivity(net, [X], lambda net, x: net(x).detach().sum()),
        ValueError,
        "`loss` must return a scalar with a gradient",
    ),
    "loss that is a number": (
        lambda net: output_sensitivity(net, [X], lambda net, x: 1.0),
        TypeError,
        "`loss` must return",
    ),
    "loss of no data": (lambda net: output_sensitivity(net, [], lambda net, x: x), ValueError, "`batches` must have"),
}


def in_a_loop(net: nn.Module, **options: Any) -> Calibration:
    calibration = Calibration(net, **options)
    with calibration.recording(X):
        net(X)
    return calibration


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_named(mistake: str):
    call, kind, message = MISTAKES[mistake]
    net = make_net()
    with pytest.raises(kind, match=message):
        call(net)
    assert not any(module._forward_pre_hooks for module in net.modules())
