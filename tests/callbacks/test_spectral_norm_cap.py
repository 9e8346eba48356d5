"""The cap holds after every step, per group and per head; what is below it stays bit for bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plugins.callbacks import SpectralNormCap
from lightning_plugins.callbacks._terms.query_key import select_query_key
from tests._processes import run_on_ranks
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Classifier, fit, make_batches, shard

BATCHES = make_batches(6, features=6)


class Attends(Classifier):
    """Two attention layers of the kinds of torch and transformers, over a sequence of two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.Module()
        self.second.query, self.second.key, self.second.num_attention_heads = nn.Linear(8, 8), nn.Linear(8, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone[:2](torch.stack([x, x.flip(1)], 1))
        tokens = tokens + self.first(tokens, tokens, tokens)[0]
        query, key = (
            layer(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.second.query, self.second.key)
        )
        weights = torch.softmax(3 * query @ key.mT, -1).mean(1)
        return self.head(self.backbone[2]((weights @ tokens).mean(1)))


def products(model: Attends) -> dict[str, Tensor]:
    q, k = model.first.in_proj_weight.detach()[:8], model.first.in_proj_weight.detach()[8:16]
    pairs = {"first": (q, k), "second": (model.second.query.weight.detach(), model.second.key.weight.detach())}
    return {
        name: torch.linalg.matrix_norm(a.unflatten(0, (2, 4)).mT @ b.unflatten(0, (2, 4)), 2)
        for name, (a, b) in pairs.items()
    }


def trained(*callbacks: Any, **settings: Any) -> Attends:
    torch.manual_seed(0)
    model = Attends()
    fit(model, settings.pop("batches", BATCHES), callbacks, **settings)
    return model


def test_query_and_key_products_stay_below_the_maximum():
    free, capped = products(trained()), products(trained(SpectralNormCap(["first", "second"], 0.4, of="query_key")))
    for name, norms in capped.items():
        assert free[name].max() > 0.5  # control
        assert norms.max() < 0.4 * 1.001


def test_heads_below_the_maximum_stay_as_they_are():
    model, plain = trained(SpectralNormCap("first", 1e3, of="query_key")), trained()
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_logits_of_a_head_shrink_as_a_whole():
    """One step with a learning rate of zero: both maps and biases by the same factor, values and other heads not."""
    torch.manual_seed(0)
    model, before = Attends(), Attends()
    with torch.no_grad():
        model.first.in_proj_weight[:4].mul_(5)
        model.first.in_proj_bias.uniform_()
    before.load_state_dict(model.state_dict())
    model.lr = 0.0
    fit(model, BATCHES[:1], [SpectralNormCap("first", 1.0, of="query_key")], max_epochs=1)
    ratio = model.first.in_proj_weight / before.first.in_proj_weight.double()
    factor = (1.0 / products(before)["first"][0].double()).sqrt()
    for rows in (slice(0, 4), slice(8, 12)):
        torch.testing.assert_close(ratio[rows], factor.expand(4, 8), rtol=1e-5, atol=0)
        bias = model.first.in_proj_bias[rows] / before.first.in_proj_bias[rows]
        torch.testing.assert_close(bias, factor.expand(4), rtol=1e-5, atol=0)
    for rows in (slice(4, 8), slice(12, 24)):
        torch.testing.assert_close(ratio[rows], torch.ones_like(ratio[rows]), rtol=0, atol=0)


class Convolves(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(12, 5)
        )


def test_every_group_of_a_convolution_has_its_own_norm():
    torch.manual_seed(0)
    model = Convolves()
    with torch.no_grad():
        model.backbone[1].weight[:2].mul_(10)
    small = model.backbone[1].weight[2:].detach().clone()
    model.lr = 0.0
    fit(model, BATCHES[:1], [SpectralNormCap("backbone.1", 1.0)], max_epochs=1, precision="32-true")
    norms = torch.linalg.matrix_norm(model.backbone[1].weight.detach().unflatten(0, (2, 2)).flatten(2), 2)
    torch.testing.assert_close(norms[0], torch.tensor(1.0))
    torch.testing.assert_close(model.backbone[1].weight[2:].detach(), small, rtol=0, atol=0)


def test_only_every_n_th_step():
    norms = []

    class Looks(SpectralNormCap):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            norms.append(torch.linalg.matrix_norm(pl_module.head.weight.detach(), 2).item())

    torch.manual_seed(0)
    fit(Classifier(), BATCHES, [Looks("head", 0.3, every_n_steps=3)], max_epochs=1)
    assert [norm < 0.301 for norm in norms[2::3]] == [True, True]
    assert max(norms) > 0.301


def on_rank(rank: int) -> dict[str, Tensor]:
    act_as_rank(rank, 2)
    batches = shard(BATCHES, BOUNDS[2])
    cap = SpectralNormCap(["first", "second"], 0.4, of="query_key")
    return dict(trained(cap, batches=batches, strategy="ddp", devices=2, max_epochs=1).state_dict())


@pytest.mark.distributed
def test_processes_stay_equal(tmp_path: Any):
    one, other = run_on_ranks(on_rank, 2, tmp_path)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    norms = torch.linalg.matrix_norm(
        one["second.query.weight"].unflatten(0, (2, 4)).mT @ one["second.key.weight"].unflatten(0, (2, 4)), 2
    )
    assert norms.max() < 0.4 * 1.001


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(8, 24), 2


def test_layouts_of_other_libraries_are_known():
    (packed,) = select_query_key(nn.Sequential(Packed()), "0")
    assert (packed.query.rows, packed.key.rows, packed.number) == ((0, 8), (8, 16), 2)
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 8}
    found = select_query_key(BertModel(BertConfig(vocab_size=10, **sizes)), "*")
    assert [maps.label for maps in found] == [f"encoder.layer.{i}.attention.self" for i in range(2)]


def grouped() -> nn.Module:
    layer: Any = nn.Module()
    layer.q_proj, layer.k_proj, layer.num_heads = nn.Linear(8, 8), nn.Linear(8, 4), 2
    return nn.ModuleDict({"attention": layer})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: SpectralNormCap("a", 0.0), ValueError, "`maximum` must be above 0, got 0.0"),
        (lambda: SpectralNormCap("a", "1"), TypeError, "`maximum` must be a number, got '1'"),
        (lambda: SpectralNormCap("a", 1.0, of="query"), ValueError, r"got 'query'; did you mean 'query_key'\?"),
        (lambda: SpectralNormCap("a", 1.0, scheme=0), ValueError, "`scheme` must be 1 or 2, got 0"),
        (lambda: SpectralNormCap("a:input", 1.0), ValueError, "`layers`"),
        (lambda: SpectralNormCap("a", 1.0, every_n_steps=0), ValueError, "`every_n_steps` must be at least 1"),
        (
            lambda: trained(SpectralNormCap("head", 1.0, of="query_key")),
            ValueError,
            "'head' must be an attention layer .* got Linear; `of='weight'`",
        ),
        (lambda: select_query_key(Classifier(), "*"), ValueError, "must match an attention layer"),
        (lambda: select_query_key(grouped(), "attention"), ValueError, "must have queries and keys of one shape"),
        (
            lambda: select_query_key(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=4)}), "a"),
            ValueError,
            "got `kdim`",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_other_strategies_are_refused():
    trainer: Any = SimpleNamespace(strategy=object(), global_step=0)
    with pytest.raises(Exception, match="SpectralNormCap supports a single device, DDP and FSDP2"):
        SpectralNormCap("head", 1.0).setup(trainer, Classifier(), "fit")
