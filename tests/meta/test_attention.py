"""Second-order inner loops through attention: meta-gradients, the forms, and what is left of the user's settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_plugins.meta import GAP, ApproximateGAP, InnerLoop, MetaSGD

TASKS, SAMPLES, LENGTH, WIDTH = 2, 3, 4, 6


def encoder(evaluation: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(LENGTH * WIDTH, 2)).train(not evaluation)


class ChoosesAKernel(nn.Module):
    """Attention whose forward pass asks for the fused kernel, which no setting around it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(LENGTH * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.out(F.scaled_dot_product_attention(query, key, value).flatten(1))


def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=4, patch_size=2, in_chans=1, num_classes=2, embed_dim=8, depth=1, num_heads=2)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=11, max_position_embeddings=LENGTH, **sizes, **no_dropout)
        config._attn_implementation = "sdpa"
        self.bert = BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits


def sequences() -> Tensor:
    return torch.randn(TASKS, SAMPLES, LENGTH, WIDTH, dtype=torch.float64)


def tokens() -> dict[str, Tensor]:
    mask = torch.ones(TASKS, SAMPLES, LENGTH, dtype=torch.long)
    mask[:, 0, -1] = 0
    return {"input_ids": torch.randint(1, 11, (TASKS, SAMPLES, LENGTH)), "attention_mask": mask}


CASES = {
    "encoder": (encoder, sequences),
    "encoder in evaluation": (lambda: encoder(True), sequences),
    "kernel of its own": (ChoosesAKernel, sequences),
    "timm ViT": (vit, lambda: torch.randn(TASKS, SAMPLES, 1, 4, 4, dtype=torch.float64)),
    "BERT": (Bert, tokens),
}


def loop_and_tasks(name: str, **settings: object) -> tuple[InnerLoop, object, object]:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    loop = InnerLoop(make().double(), F.mse_loss, steps=2, learning_rate=0.3, **settings)
    parts = [(inputs(), torch.randn(TASKS, SAMPLES, 2, dtype=torch.float64)) for _ in range(2)]
    return loop, *parts


def used(loop: InnerLoop) -> list[Tensor]:
    return [parameter for parameter in loop.parameters() if parameter.requires_grad]


def gradient(loop: InnerLoop, support: object, query: object) -> list[Tensor]:
    found = torch.autograd.grad(loop(support, query).loss, used(loop), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(used(loop), found, strict=True)]


def check_by_differences(loop: InnerLoop, support: object, query: object) -> None:
    found = gradient(loop, support, query)
    torch.manual_seed(1)
    direction = [torch.randn_like(parameter) for parameter in used(loop)]
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, change in zip(used(loop), direction, strict=True):
                parameter.add_(step * change)
            losses.append(loop(support, query).loss)
    along = sum((g * d).sum() for g, d in zip(found, direction, strict=True))
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, along, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_meta_gradient_is_that_of_finite_differences(name: str):
    loop, support, query = loop_and_tasks(name, vectorize=False)
    check_by_differences(loop, support, query)


@pytest.mark.parametrize("name", [name for name in CASES if name != "BERT"])
@pytest.mark.parametrize("first_order", [False, True])
def test_vectorised_is_looped(name: str, first_order: bool):
    found = [gradient(*loop_and_tasks(name, vectorize=v, first_order=first_order)) for v in (False, True)]
    torch.testing.assert_close(found[1], found[0])


def test_a_model_whose_masks_vmap_cannot_read_is_looped_over():
    """The mask of BERT is looked at before it is used."""
    expected = gradient(*loop_and_tasks("BERT", vectorize=False))
    with pytest.warns(UserWarning, match="one after the other, since vectorising them failed"):
        found = gradient(*loop_and_tasks("BERT"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("preconditioner", [MetaSGD, lambda: GAP(linear=True), lambda: ApproximateGAP(linear=True)])
def test_preconditioned(preconditioner: type):
    """As the gradient itself at the start; then the three parts of the packed weight have gains of their own."""
    loop, support, query = loop_and_tasks("encoder", preconditioner=preconditioner())
    plain, *_ = loop_and_tasks("encoder")
    torch.testing.assert_close(loop(support, query).loss, plain(support, query).loss, rtol=1e-2, atol=0)
    assert all(g.isfinite().all() and g.any() for g in gradient(loop, support, query)[-3:])


def test_parts_of_a_packed_weight_have_gains_of_their_own():
    torch.manual_seed(0)
    weight = torch.randn(3 * WIDTH, WIDTH)
    gap = GAP(linear=True)
    gap.initialise({"attn.in_proj_weight": weight, "attn.in_proj_bias": weight[:, 0]}, steps=1)
    assert list(gap.gains()) == [f"attn.in_proj_weight:{part}" for part in ("query", "key", "value")]
    with torch.no_grad():
        gap.raw["attn/in_proj_weight:key"].fill_(-50.0)  # a gain of zero
    update = gap({"attn.in_proj_weight": weight, "attn.in_proj_bias": weight[:, 0]}, 0)["attn.in_proj_weight"]
    for part, expected in zip(update.chunk(3), weight.chunk(3), strict=True):
        ratio = torch.linalg.svdvals(part) / torch.linalg.svdvals(expected)
        wanted = 0.0 if torch.equal(expected, weight[WIDTH : 2 * WIDTH]) else 1.0006
        torch.testing.assert_close(ratio, torch.full_like(ratio, wanted), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_settings_are_restored_also_after_an_error(vectorize: bool):
    def settings() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        kernels = (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
        return (*kernels, torch.backends.mha.get_fastpath_enabled())

    loop, support, query = loop_and_tasks("encoder", vectorize=vectorize)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        before = settings()
        gradient(loop, support, query)
        assert settings() == before
        with pytest.raises((RuntimeError, AssertionError), match="5"):
            loop((support[0][..., :-1], support[1]), query)
        assert settings() == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("first_order", "expected"), [(True, [True] * 3 * TASKS), (False, [False, False, True] * TASKS)]
)
def test_only_second_order_steps_leave_the_fast_kernel(first_order: bool, expected: list[bool]):
    """Two inner steps and the query pass of each task."""
    enabled = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            enabled.append(torch.backends.cuda.flash_sdp_enabled())
            return x

    torch.manual_seed(0)
    network = nn.Sequential(encoder(), Look()).double()
    loop = InnerLoop(network, F.mse_loss, steps=2, first_order=first_order, vectorize=False)
    loop._checked = True  # no trial run
    batch = (sequences(), torch.zeros(TASKS, SAMPLES, 2, dtype=torch.float64))
    loop(batch, batch)
    assert enabled == expected


def with_adapters(frozen: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
    model = get_peft_model(vit(), config).double()
    return model if frozen else model.requires_grad_(True)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
def test_adapters_alone_adapt(frozen: bool, vectorize: bool):
    """The base either stays out of it, or learns over tasks without adapting."""
    model = with_adapters(frozen)
    layers = None if frozen else "*lora_?.default"
    loop = InnerLoop(model, F.mse_loss, steps=2, learning_rate=0.3, layers=layers, vectorize=vectorize)
    assert len(loop.adapted) == 6
    assert all("lora" in name for name in loop.adapted)
    inputs = CASES["timm ViT"][1]
    torch.manual_seed(1)
    batches = [(inputs(), torch.randn(TASKS, SAMPLES, 2, dtype=torch.float64)) for _ in range(2)]
    assert len(used(loop)) == (6 if frozen else len(list(model.parameters())))
    check_by_differences(loop, *batches)
