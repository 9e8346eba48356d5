import copy

import pytest
import timm
import torch
from torch import nn

from lightning_plugins.compression import factorize, low_rank_layer, restore_structure
from lightning_plugins.compression.channels.resize import resize_heads, resize_layer
from tests.models import Classifier


class Net(nn.Module):
    """Convolutions with and without groups, norms, a linear head; ``keep`` of the eight channels are left."""

    def __init__(self, keep: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, keep, 3, padding=1)
        self.norm = nn.BatchNorm2d(keep)
        self.depthwise = nn.Conv2d(keep, 2 * keep, 3, groups=keep)
        self.group_norm = nn.GroupNorm(2, 2 * keep)
        self.grouped = nn.Conv2d(2 * keep, keep, 1, groups=2, bias=False)
        self.scheme_2 = nn.Conv2d(keep, 8, (3, 2), padding_mode="circular")
        self.layer_norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 6)
        self.prelu = nn.PReLU(6)
        self.up = nn.ConvTranspose1d(6, 5, 2)

    def forward(self, x):
        x = self.group_norm(self.depthwise(self.norm(self.stem(x)).relu()))
        x = self.layer_norm(self.scheme_2(self.grouped(x)).flatten(2).mean(2))
        return self.up(self.prelu(self.fc(x))[..., None])


X = torch.randn(2, 3, 8, 8)
SCHEME_1 = {"stem": 3, "fc": 2}


def low_rank(net):
    factorize(net, {name: rank for name, rank in SCHEME_1.items() if rank < 8}, only_if_smaller=False)
    return factorize(net, {"scheme_2": 4}, only_if_smaller=False, scheme=2)


def check(dense, small, inputs=X, state=None):
    """From ``dense`` and the state of ``small`` comes a model that computes what ``small`` does."""
    state = small.state_dict() if state is None else state
    assert restore_structure(dense, state) is dense
    dense.load_state_dict(small.state_dict(), strict=True)
    torch.testing.assert_close(dense.eval()(inputs), small.eval()(inputs), rtol=0, atol=0)
    assert repr(dense) == repr(small)
    modules, tensors = [id(m) for m in dense.modules()], [id(p) for p in dense.parameters()]
    restore_structure(dense, state)
    assert ([id(m) for m in dense.modules()], [id(p) for p in dense.parameters()]) == (modules, tensors)


@pytest.mark.parametrize("keep", [8, 6, 4])
@pytest.mark.parametrize("split", [False, True], ids=["dense", "low rank"])
def test_structure_follows_from_the_state_alone(keep, split):
    small = low_rank(Net(keep)) if split else Net(keep)
    small(X)  # statistics of the norm
    check(Net(), small)


def test_shapes_of_other_ranks_change_a_low_rank_model():
    other = factorize(Net(), {"stem": 1, "fc": 5}, only_if_smaller=False)
    factorize(other, {"scheme_2": 6}, only_if_smaller=False, scheme=2)
    check(low_rank(Net()), other)


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("scheme", [1, 2])
def test_scheme_is_told_from_the_kernels(kernel, scheme):
    def made():
        return nn.Sequential(nn.Conv2d(4, 6, kernel, stride=(2, 1), padding=(2, 1), padding_mode="replicate"))

    small = factorize(made(), 3, only_if_smaller=False, scheme=scheme)
    check(made(), small, torch.randn(1, 4, 7, 7))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_as_in_the_state(bias):
    small = factorize(nn.Sequential(nn.Linear(8, 8, bias=bias)), 2)
    check(nn.Sequential(nn.Linear(8, 8, bias=not bias)), small, torch.randn(2, 8))


PREFIXED = {
    "plain": lambda state: state,
    "model.": lambda state: {f"model.{key}": value for key, value in state.items()},
    "module.model.": lambda state: {f"module.model.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "compiled inside": lambda state: {f"model._orig_mod.{key}": value for key, value in state.items()},
    "checkpoint": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
    "model is small": lambda state: {"global_step": 1, "state_dict": state},
}


@pytest.mark.parametrize("name", PREFIXED)
def test_names_may_have_a_prefix(name):
    small = low_rank(Net(6))
    check(Net(), small, state=PREFIXED[name](small.state_dict()))


def test_the_model_may_have_the_prefix():
    small = low_rank(Net(6))
    wrapper = nn.ModuleDict({"net": Net()})
    restore_structure(wrapper, small.state_dict())
    wrapper["net"].load_state_dict(small.state_dict())
    assert repr(wrapper["net"]) == repr(small)


def test_compiled_model_gets_the_structure():
    small, dense = low_rank(Net(6)), torch.compile(Net(), backend="eager")
    restore_structure(dense, small.state_dict())
    dense._orig_mod.load_state_dict(small.state_dict())
    torch.testing.assert_close(dense.eval()(X), small.eval()(X))


def test_lightning_module_gets_the_structure_while_it_loads():
    small = factorize(Classifier(), 2, ["backbone.*", "head"], only_if_smaller=False)

    def rebuild(module, state, *_):
        restore_structure(module, state)

    fresh = Classifier()
    fresh.register_load_state_dict_pre_hook(rebuild)
    fresh.load_state_dict(small.state_dict(), strict=True)
    x = torch.randn(2, 6)
    torch.testing.assert_close(fresh(x), small(x), rtol=0, atol=0)


def test_device_dtype_and_what_is_trained_stay():
    small = low_rank(Net(6))
    dense = Net().to(torch.bfloat16).to("meta").eval()
    dense.stem.weight.requires_grad_(False)
    dense.norm.bias.requires_grad_(False)
    restore_structure(dense, small.state_dict())
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in dense.state_dict().values()} == {"meta"}
    frozen = {name for name, parameter in dense.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem.0.weight", "stem.1.weight", "norm.bias"}
    assert not any(module.training for module in dense.modules())
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in small.named_parameters()]


class Shared(nn.Module):
    """A layer at two places, and two layers with one weight."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.a, self.tied, self.too = nn.Linear(8, 8), nn.Linear(8, size), nn.Linear(8, size)
        self.b, self.too.weight = self.a, self.tied.weight

    def forward(self, x):
        return self.tied(self.b(self.a(x))) + self.too(x)


def test_shared_modules_and_tied_parameters_stay_so():
    dense = Shared()
    check(dense, factorize(Shared(5), {"a": 3}, only_if_smaller=False), torch.randn(2, 8))
    assert dense.a is dense.b
    assert dense.tied.weight is dense.too.weight
    assert dense.tied.out_features == dense.too.out_features == 5


def pruned_heads(attention, keep):
    """Leave the first heads of timm's attention."""
    rows = keep * attention.head_dim
    q_k_v = attention.qkv.weight.detach().unflatten(0, (3, -1))[:, :rows].flatten(0, 1)
    bias = attention.qkv.bias.detach().unflatten(0, (3, -1))[:, :rows].flatten()
    resize_layer(attention.qkv, {"weight": q_k_v, "bias": bias})
    resize_layer(attention.proj, {"weight": attention.proj.weight.detach()[:, :rows]})
    resize_heads(attention, keep)


@pytest.mark.parametrize("split", [False, True], ids=["dense", "low rank"])
def test_heads_of_timm_are_counted(split):
    def made():
        return timm.create_model("test_vit", img_size=32, num_heads=4, num_classes=3)

    small = made()
    pruned_heads(small.blocks[0].attn, 3)
    pruned_heads(small.blocks[2].attn, 1)
    if split:
        factorize(small, 0.5)
        assert isinstance(small.blocks[0].attn.qkv, nn.Sequential)
    dense = made()
    check(dense, small, torch.randn(2, 3, 32, 32))
    assert [block.attn.num_heads for block in dense.blocks[:3]] == [3, 4, 1]
    assert dense.blocks[0].attn.attn_dim == 3 * dense.blocks[0].attn.head_dim


def test_heads_of_transformers_are_counted():
    transformers = pytest.importorskip("transformers")

    def made():
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
        return transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes))

    small = made()
    attention = small.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        layer = getattr(attention.self, name)
        resize_layer(layer, {"weight": layer.weight[:8].detach(), "bias": layer.bias[:8].detach()})
    resize_layer(attention.output.dense, {"weight": attention.output.dense.weight[:, :8].detach()})
    resize_heads(attention.self, 2)
    dense, ids = made(), torch.arange(6)[None]
    restore_structure(dense, small.state_dict()).load_state_dict(small.state_dict())
    again = dense.encoder.layer[0].attention.self
    assert (again.num_attention_heads, again.all_head_size) == (2, 8)
    torch.testing.assert_close(dense.eval()(ids)[0], small.eval()(ids)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shapes", "expected"),
    [
        (nn.Linear(5, 6), {"weight": (4, 3), "bias": (4,)}, nn.Linear(3, 4)),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": (6, 1, 3, 3), "bias": (6,)}, nn.Conv2d(3, 6, 3, groups=3)),
        (nn.Conv2d(4, 8, 3, groups=2), {"weight": (6, 1, 3, 3), "bias": (6,)}, nn.Conv2d(2, 6, 3, groups=2)),
        (nn.ConvTranspose2d(4, 6, 2), {"weight": (3, 5, 2, 2), "bias": (5,)}, nn.ConvTranspose2d(3, 5, 2)),
        (nn.BatchNorm1d(4, affine=False), {"running_mean": (3,), "running_var": (3,)}, nn.BatchNorm1d(3, affine=False)),
        (nn.GroupNorm(2, 8), {"weight": (6,), "bias": (6,)}, nn.GroupNorm(2, 6)),
        (nn.LayerNorm(8), {"weight": (6,), "bias": (6,)}, nn.LayerNorm(6)),
        (nn.RMSNorm(8), {"weight": (6,)}, nn.RMSNorm(6)),
        (nn.PReLU(8), {"weight": (6,)}, nn.PReLU(6)),
        (nn.Embedding(9, 8), {"weight": (9, 6)}, nn.Embedding(9, 6)),
        (timm.layers.LayerNorm2d(8), {"weight": (6,), "bias": (6,)}, timm.layers.LayerNorm2d(6)),
    ],
    ids=str,
)
def test_resized_layer_is_the_layer_of_that_size(layer, shapes, expected):
    resize_layer(layer, {name: torch.ones(shape) for name, shape in shapes.items()})
    assert repr(layer) == repr(expected)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    sizes = {name: value for name, value in vars(expected).items() if isinstance(value, int | tuple)}
    assert {name: vars(layer)[name] for name in sizes} == sizes
    assert all(bool((layer.get_parameter(name) == 1).all()) for name in shapes if name in layer._parameters)


def changed(**shapes):
    """A state with tensors of other names or shapes; None takes one out."""
    state = dict(Net().state_dict())
    for key, shape in shapes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.zeros(shape)
    return state


FC = {"fc__weight": None, "fc__bias": None}
STEM = {"stem__weight": None, "stem__bias": None}
BAD = [
    ("weights.ckpt", TypeError, r"`state_dict` must be a mapping.*got str; load the file first"),
    ({}, ValueError, "`state_dict` must hold a module's tensors.*got nothing"),
    ({"epoch": 3}, ValueError, "must hold a module's tensors.*'epoch'"),
    ({"conv.weight": torch.zeros(2)}, ValueError, r"must be one of Net.*'stem\.weight'.*'conv\.weight'"),
    (changed(steem__weight=(2, 2)), ValueError, r"'steem\.weight' is unknown to the model \(nearest: 'stem\.weight'\)"),
    (
        changed(fc__weight=(7, 8)),
        ValueError,
        r"'fc\.weight' has shape \(7, 8\), .* larger than the model's \(6, 8\)",
    ),
    (changed(fc__weight=(6, 8, 1)), ValueError, r"'fc' \(Linear\) comes with .*: its `weight` has 2 dimensions"),
    (changed(stem__weight=(8, 3, 1, 1)), ValueError, r"'stem' .*its kernel is \(3, 3\), not \(1, 1\)"),
    (changed(group_norm__weight=(7,)), ValueError, "7 channels do not fall into its 2 groups"),
    (changed(grouped__weight=(7, 8, 1, 1)), ValueError, "'grouped'.*7 channels do not fall into its 2 groups"),
    (changed(**FC, fc__0__weight=(2, 8)), ValueError, r"'fc' comes in two with weights \(2, 8\) and None"),
    (changed(**FC, fc__0__weight=(2, 8), fc__1__weight=(6, 3)), ValueError, "'fc' comes in two.*no low-rank form"),
    (changed(**FC, fc__0__weight=(2, 9), fc__1__weight=(6, 2)), ValueError, "'fc' comes in two.*no low-rank form"),
    (
        changed(**STEM, stem__0__weight=(2, 3, 3, 3), stem__1__weight=(8, 2, 3, 1)),
        ValueError,
        "'stem' comes in two with weights .*no low-rank form of",
    ),
    (
        changed(depthwise__weight=None, depthwise__0__weight=(2, 1, 3, 3), depthwise__1__weight=(16, 2, 1, 1)),
        ValueError,
        "'depthwise' comes in two and has 8 groups",
    ),
    (
        changed(**FC, fc__0__weight=(2, 8), fc__1__weight=(2, 2), fc__2__weight=(6, 2)),
        ValueError,
        r"'fc\.2\.weight' is unknown",
    ),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD)
def test_what_cannot_be_explained_is_named_and_changes_nothing(state, error, message):
    net = Net()
    before = repr(net), [id(p) for p in net.parameters()]
    with pytest.raises(error, match=message):
        restore_structure(net, state)
    assert (repr(net), [id(p) for p in net.parameters()]) == before


def test_heads_that_are_not_whole_are_refused():
    model = timm.create_model("test_vit", img_size=32, num_heads=4, num_classes=3)
    state = dict(model.state_dict())
    state["blocks.0.attn.qkv.weight"] = torch.zeros(3 * 20, 64)
    with pytest.raises(ValueError, match=r"has 60 outputs, which is not a whole number of heads"):
        restore_structure(model, state)


def test_dense_state_for_a_low_rank_model_is_refused():
    with pytest.raises(ValueError, match="'stem' is dense there and low-rank in the model; start from a fresh model"):
        restore_structure(low_rank(Net()), Net().state_dict())


def test_packed_projections_are_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    state = {**model.state_dict(), "0.in_proj_weight": torch.zeros(12, 8)}
    with pytest.raises(ValueError, match=r"'0' \(MultiheadAttention\) comes with other shapes"):
        restore_structure(model, state)


def test_strangers_are_passed_over_on_request():
    small = low_rank(Net(6))
    state = {**small.state_dict(), "teacher.weight": torch.zeros(2)}
    dense = restore_structure(Net(), state, strict=False)
    assert dense.load_state_dict(state, strict=False).unexpected_keys == ["teacher.weight"]
    assert repr(dense) == repr(small)


def test_layer_without_such_a_tensor_cannot_be_resized():
    with pytest.raises(ValueError, match=r"`tensors` must fit a Linear, but it has no tensor called 'scale'"):
        resize_layer(nn.Linear(2, 2), {"scale": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"`attention` must have one of the attributes.*got Linear"):
        resize_heads(nn.Linear(2, 2), 1)


def test_restored_layer_is_trained_like_a_split_one():
    small = nn.Sequential(low_rank_layer(nn.Linear(8, 8), 2))
    dense = restore_structure(nn.Sequential(nn.Linear(8, 8)), small.state_dict())
    dense.load_state_dict(small.state_dict())
    for model in (small, dense):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dense.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert copy.deepcopy(dense)[0][0].weight.is_contiguous()


def test_a_dense_state_dict_for_a_model_that_is_low_rank_throughout_is_named():
    dense, small = (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)) for _ in range(2))
    factorize(small, 2)
    with pytest.raises(ValueError, match="'0' is dense there and low-rank in the model; start from a fresh model"):
        restore_structure(small, dense.state_dict(), strict=False)
