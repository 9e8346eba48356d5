"""The rows of layers: layouts from the modules, masks of the same call, selection from nested outputs."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from lightning_plugins.callbacks import (
    LayerCall,
    LowRankCompression,
    Readout,
    RepresentationMonitor,
    Timing,
    VNERegularization,
)
from lightning_plugins.callbacks._rows.capture import LayerRows
from lightning_plugins.functional import von_neumann_entropy
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.models import Batches, Classifier, entropy_by_autograd, fit, make_batches

N, L, C = 4, 6, 5


def rows_of(model: nn.Module, layer: str, *inputs: Any, batch: Any = None, **settings: Any) -> list[Tensor]:
    capture = LayerRows(model, layer, Readout(**settings), needs_gradient=False)
    capture.attach()
    with capture.recording(batch):
        model(*inputs)
    (rows,) = capture.take().values()
    return rows


def only(model: nn.Module, layer: str, *inputs: Any, **settings: Any) -> Tensor:
    (rows,) = rows_of(model, layer, *inputs, **settings)
    return rows


class Wrapped(nn.Module):
    """A module around a layer, of which nothing is known."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class Turned(nn.Module):
    """Hands its tensor on in another order than the layers inside it have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(C, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).transpose(1, 2)


TOKENS, FIRST = torch.randn(N, L, C), torch.randn(N, C, L)
MODULES: dict[str, tuple[nn.Module, Tensor, Any]] = {
    "Conv1d": (nn.Conv1d(C, 7, 1), FIRST, lambda y: y.mean(2)),
    "ConvTranspose1d": (nn.ConvTranspose1d(C, 7, 1), FIRST, lambda y: y.mean(2)),
    "Conv2d": (nn.Conv2d(C, 7, 1), FIRST[..., None].expand(-1, -1, -1, 3), lambda y: y.mean((2, 3))),
    "Conv3d": (nn.Conv3d(C, 7, 1), FIRST[..., None, None].expand(-1, -1, -1, 3, 2), lambda y: y.mean((2, 3, 4))),
    "BatchNorm1d": (nn.BatchNorm1d(C), FIRST, lambda y: y.mean(2)),
    "AvgPool1d": (nn.AvgPool1d(2), FIRST, lambda y: y.mean(2)),
    "GroupNorm": (nn.GroupNorm(1, C), FIRST, lambda y: y.mean(2)),
    "Linear": (nn.Linear(C, 7), TOKENS, lambda y: y.mean(1)),
    "LayerNorm": (nn.LayerNorm(C), TOKENS, lambda y: y.mean(1)),
    "LSTM": (nn.LSTM(C, 7), TOKENS, lambda y: y[0].mean(0)),
    "LSTM, batch first": (nn.LSTM(C, 7, batch_first=True), TOKENS, lambda y: y[0].mean(1)),
    "GRU, both ways": (nn.GRU(C, 7, bidirectional=True), TOKENS, lambda y: y[0].mean(0)),
    "encoder layer": (nn.TransformerEncoderLayer(C, 1, 8, 0.0), TOKENS, lambda y: y.mean(0)),
    "encoder": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(C, 1, 8, 0.0, batch_first=True), 1, enable_nested_tensor=False
        ),
        TOKENS,
        lambda y: y.mean(1),
    ),
    "sequence that ends in a convolution": (nn.Sequential(nn.Conv1d(C, 7, 1), nn.ReLU()), FIRST, lambda y: y.mean(2)),
    "sequence that ends in a linear layer": (nn.Sequential(nn.Linear(C, 7), nn.GELU()), TOKENS, lambda y: y.mean(1)),
    "custom, convolutions alone": (Wrapped(nn.Conv1d(C, 7, 1)), FIRST, lambda y: y.mean(2)),
    "custom, linear layers alone": (Wrapped(nn.Linear(C, 7)), TOKENS, lambda y: y.mean(1)),
}


@pytest.mark.parametrize("case", MODULES)
def test_the_layout_comes_from_the_module(case: str):
    layer, given, by_hand = MODULES[case]
    torch.testing.assert_close(only(Wrapped(layer), "layer", given), by_hand(layer(given)))


def test_an_activation_has_the_layout_of_what_stands_before_it():
    model = nn.Sequential(nn.Conv1d(C, 7, 1), nn.ReLU(), nn.Dropout(0.0))
    torch.testing.assert_close(only(model, "2", FIRST), model(FIRST).mean(2))


@pytest.mark.parametrize("side", ["", ":input"])
def test_layers_inside_a_transformer_with_tokens_first(side: str):
    model = Wrapped(nn.TransformerEncoderLayer(C, 1, 8, 0.0)).eval()
    with torch.enable_grad():
        rows = only(model, f"layer.linear1{side}", TOKENS)
    assert rows.shape == (L, 8 if not side else C)


def test_last_states_of_an_lstm_have_layers_first_whatever_the_batch():
    model = Wrapped(nn.LSTM(C, 7, 2, batch_first=True))
    torch.testing.assert_close(only(model, "layer", TOKENS, select=[1, 0]), model(TOKENS)[1][0].mean(0))


@pytest.mark.parametrize(
    ("model", "layer", "given"),
    [
        (nn.Sequential(nn.LSTM(C, C), Wrapped(nn.Identity())), "1.layer", None),
        (Wrapped(Turned()), "layer", FIRST),
        (Wrapped(nn.Identity()), "layer", TOKENS),
        (Wrapped(nn.MultiheadAttention(C, 1, batch_first=True)), "layer", "weights"),
        (Wrapped(nn.LayerNorm((L, C))), "layer", TOKENS),
    ],
    ids=["behind an LSTM", "turned inside", "nothing known", "attention weights", "norm over two dimensions"],
)
def test_what_is_not_known_is_asked_for(model: nn.Module, layer: str, given: Any):
    settings: dict[str, Any] = {"select": 1} if given == "weights" else {}
    inputs = (TOKENS,) * 3 if given == "weights" else (given,)
    if given is None:
        model, inputs = Wrapped(nn.ModuleDict({"lstm": nn.LSTM(C, C), "mid": nn.Linear(C, 3)})), (TOKENS,)
        model.forward = lambda x: model.layer["mid"](model.layer["lstm"](x)[0])
        layer = "layer.mid"
    with pytest.raises(ValueError, match=rf"'{layer}': the dimensions of its tensor .* name them with `layout`"):
        only(model, layer, *inputs, **settings)
    assert only(model, layer, *inputs, layout="NLC", **settings).ndim == 2


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.Conv1d(C, 7, 1), torch.randn(C, L)),
        (nn.Conv2d(C, 7, 1), torch.randn(C, 3, 3)),
        (nn.LSTM(C, 7), torch.randn(L, C)),
        (nn.InstanceNorm1d(C), torch.randn(C, L)),
        (nn.TransformerEncoderLayer(C, 1, 8, 0.0), torch.randn(L, C)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_sample_without_its_dimension_is_refused(layer: nn.Module, given: Tensor):
    with pytest.raises(ValueError, match="on one sample without a dimension of samples"):
        only(Wrapped(layer), "layer", given)


def test_packed_and_nested_sequences_know_their_padding():
    parts = [torch.randn(length, C) for length in (6, 2, 4)]
    model = Wrapped(nn.LSTM(C, 7))
    expected = torch.stack([model(part[:, None])[0][:, 0].mean(0) for part in parts])
    packed = pack_sequence(parts, enforce_sorted=False)
    torch.testing.assert_close(only(model, "layer", packed), expected)
    assert only(model, "layer", packed, pool="tokens").shape == (12, 7)
    torch.testing.assert_close(
        only(model, "layer", packed, pool="last"), torch.stack([model(part[:, None])[0][-1, 0] for part in parts])
    )
    nested = torch.nested.nested_tensor(parts)
    torch.testing.assert_close(only(Wrapped(nn.Identity()), "layer", nested), torch.stack([p.mean(0) for p in parts]))


Output = namedtuple("Output", ["hidden", "logits"])


class Nests(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return SimpleNamespace(states=[{"a": y, "b": (x, y + 1)}], named=Output(y, y + 2))


@pytest.mark.parametrize(
    ("select", "offset"),
    [(["states", 0, "a"], 0), (["states", -1, "b", 1], 1), (["named", "logits"], 2), (["named", 0], 0)],
)
def test_select_leads_into_any_nested_output(select: Any, offset: float):
    model, x = Wrapped(Nests()), torch.randn(N, C)
    torch.testing.assert_close(only(model, "layer", x, select=select), model.layer.inner(x) + offset)


class Padded(LightningModule):
    """A network of one of four types, two passes a step, whose padding changes nothing before it."""

    def __init__(self, kind: str, *, views: int = 2, recompute: bool = False) -> None:
        super().__init__()
        self.kind, self.views, self.recompute = kind, views, recompute
        self.embed = nn.Embedding(20, 6) if kind in {"bert", "lstm", "conv"} else nn.Linear(3, 6)
        self.cls = nn.Parameter(torch.randn(6))
        if kind in {"bert", "vit"}:
            self.body: nn.Module = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=True)
        else:
            self.body = nn.LSTM(6, 6, batch_first=True) if kind == "lstm" else nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(x)
        if self.kind == "conv":
            return self.body((h * attention_mask[..., None]).mT)
        if self.kind == "lstm":
            return self.body(h)[0]
        if self.kind == "vit":  # with one token more than the mask of the call around it
            h = torch.cat([self.cls.expand(len(h), 1, 6), h], 1)
            attention_mask = torch.cat([attention_mask[:, :1] | 1, attention_mask], 1)
        run = lambda h: self.body(h, src_key_padding_mask=attention_mask == 0)  # noqa: E731  # as checkpoint takes it
        return checkpoint(run, h, use_reentrant=False) if self.recompute else run(h)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = []
        for view in range(self.views):
            out = self(batch["x"][view], batch["attention_mask"][view])
            losses.append(0 * self.head(out.mT if self.kind == "conv" else out).sum())
        return sum(losses)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


KINDS = ["bert", "vit", "lstm", "conv"]
LENGTHS = ([5, 2, 7, 3, 6], [4, 4, 1, 6, 2])
MASKS = {"vit": "src_key_padding_mask"}


def padded_batch(kind: str, padding: tuple[int, int], samples: slice = slice(None)) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    views: dict[str, list[Tensor]] = {"x": [], "attention_mask": []}
    for lengths, more in zip(LENGTHS, padding, strict=True):
        tokens = torch.randint(20, (len(lengths), 8), generator=generator)
        patches = torch.randn(len(lengths), 8, 3, generator=generator)
        size = max(lengths) + more
        mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
        x = torch.randint(20, (len(lengths), size)) if kind != "vit" else 9 * torch.randn(len(lengths), size, 3)
        filled = tokens if kind != "vit" else patches
        for i, length in enumerate(lengths):
            x[i, :length] = filled[i, :length]
        views["x"].append(x[samples])
        views["attention_mask"].append(mask[samples])
    return views


def unpadded_entropy(model: Padded, pool: str) -> Tensor:
    """Each sample by itself, without padding, then the entropy of all."""
    entropies = []
    for view in range(2):
        rows = []
        for i, length in enumerate(LENGTHS[view]):
            batch = padded_batch(model.kind, (1, 1), slice(i, i + 1))
            x, mask = batch["x"][view][:, :length], batch["attention_mask"][view][:, :length]
            out = model(x.double() if x.is_floating_point() else x, mask)[0]
            out = out.mT if model.kind == "conv" else out
            rows.append(out.mean(0, keepdim=True) if pool == "mean" else out)
        entropies.append(entropy_by_autograd(torch.cat(rows)))
    return torch.stack(entropies).mean()


def trained(kind: str, padding: tuple[int, int], pool: str, samples: slice = slice(None), **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Padded(kind, recompute=settings.pop("recompute", False))
    callback = VNERegularization(
        "body", weight=-0.5, readout=Readout(mask=MASKS.get(kind, "attention_mask"), pool=pool)
    )
    torch.manual_seed(sum(padding))  # of what stands in the padding
    batch = padded_batch(kind, padding, samples)
    passed = settings.pop("passed", lambda model: model)(model)
    trainer = fit(passed, [batch], [callback], max_epochs=1, **settings)
    return trainer.callback_metrics["vne/body/entropy"], dict(model.state_dict())


def expected_training(kind: str, pool: str) -> Any:
    torch.manual_seed(0)
    model = Padded(kind).double()
    entropy = unpadded_entropy(model, pool)
    (0.5 * entropy).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    return entropy.detach(), dict(model.state_dict())


EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("pool", ["mean", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_entropy_and_gradient_are_those_without_padding(kind: str, pool: str):
    expected = expected_training(kind, pool)
    for padding in ((0, 0), (5, 0), (1, 9)):
        torch.testing.assert_close(trained(kind, padding, pool), expected, **EXACT, check_dtype=False)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_masks_under_gradient_checkpointing(kind: str):
    found = trained(kind, (3, 1), "mean", recompute=True)
    torch.testing.assert_close(found, expected_training(kind, "mean"), **EXACT, check_dtype=False)


@pytest.mark.parametrize("kind", ["bert", "conv"])
def test_masks_under_compile(kind: str):
    entropy, _ = trained(kind, (3, 1), "mean", passed=lambda model: torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(entropy, expected_training(kind, "mean")[0], **EXACT, check_dtype=False)


def on_a_rank(rank: int) -> Any:
    act_as_rank(rank, 2)
    samples = slice(0, 2) if rank == 0 else slice(2, 5)
    return {
        (kind, pool): trained(kind, (2 + rank, 1), pool, samples, strategy="ddp_find_unused_parameters_true", devices=2)
        for kind in KINDS
        for pool in ("mean", "tokens")
    }


@pytest.mark.distributed
def test_masks_on_two_unequal_ranks(tmp_path: Any):
    for found in run_on_ranks(on_a_rank, 2, tmp_path):
        for (kind, pool), result in found.items():
            torch.testing.assert_close(result, expected_training(kind, pool), **EXACT, check_dtype=False)


def by_ids(call: LayerCall) -> Tensor:
    return call["x"] != 0


class Classifies(Padded):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, mask = (batch["x"], batch["keep"]) if isinstance(batch, dict) else batch
        return self.head(self(x, mask)).sum()

    validation_step = training_step


@pytest.mark.parametrize(
    "mask",
    ["attention_mask", "src_key_padding_mask", "keep", by_ids, f"{__name__}.by_ids", 1],
    ids=lambda mask: getattr(mask, "__name__", str(mask)),
)
def test_a_mask_by_argument_entry_or_callable(mask: Any):
    x = torch.tensor([[3, 5, 7, 0, 0], [2, 4, 0, 0, 0], [9, 1, 1, 8, 6]])
    keep = (x != 0).long()
    batch: Any = (x, keep) if mask == 1 else {"x": x, "keep": keep}
    model = Classifies("bert")
    monitor = RepresentationMonitor(
        "body", readout=Readout(mask=mask), every_n_steps=1, metrics=["entropy"], figures=False
    )
    out = model.double()(x, keep).detach()
    expected = entropy_by_autograd(torch.stack([out[0, :3].mean(0), out[1, :2].mean(0), out[2].mean(0)]))
    trainer = fit(model, [batch], [VNERegularization("body", 0.0, readout=Readout(mask=mask)), monitor], max_epochs=1)
    torch.testing.assert_close(trainer.callback_metrics["vne/body/entropy"], expected, check_dtype=False)
    torch.testing.assert_close(trainer.callback_metrics["representation/train/body/entropy"], expected)


def test_a_monitor_measures_nested_tensors_of_a_padded_encoder():
    class Encodes(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0], src_key_padding_mask=batch[1]).sum()

        validation_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    x, padding = torch.randn(4, 5, 6), torch.arange(5) >= torch.tensor([2, 5, 3, 4])[:, None]
    monitor = RepresentationMonitor(
        "net.layers.0",
        every_n_steps=1,
        readout=Readout(mask="src_key_padding_mask"),
        metrics=["entropy"],
        figures=False,
    )
    trainer = fit(Encodes(), [(x, padding)], [monitor], max_epochs=1, validation=Batches([(x, padding)]))
    logged = trainer.callback_metrics
    torch.testing.assert_close(
        logged["representation/val/net.layers.0/entropy"], logged["representation/train/net.layers.0/entropy"]
    )


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layer", ["head", "head:input"])
def test_a_layer_that_is_replaced_in_training_is_followed(layer: str, first: bool):
    """By its factors, say; whichever of the callbacks comes first."""
    model, batches = Classifier(lr=0.0), make_batches(2)
    timing = Timing(unit="steps", search_at=0, factorize_at=2)
    splits = LowRankCompression("head", ranks={"head": 1}, timing=timing, figures=False)
    term = VNERegularization(layer, 0.1)
    trainer = fit(model, batches, [term, splits] if first else [splits, term], max_epochs=3)
    assert isinstance(model.head, nn.Sequential)  # control
    features = model.backbone(batches[-1][0].double())
    expected = von_neumann_entropy(model.head(features) if layer == "head" else features)
    torch.testing.assert_close(trainer.callback_metrics["vne/head/entropy"].double(), expected.detach())
