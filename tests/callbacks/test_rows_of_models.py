"""Layouts and masks in networks of timm and transformers: every layer is read as it is, none is asked for."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lightning_plugins.callbacks import Readout
from lightning_plugins.callbacks._rows.capture import LayerRows

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IDS = torch.randint(1, 50, (3, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 64, 64)


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=50, **SIZES))


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2))


NETWORKS: dict[str, tuple[Any, Tensor, dict[str, int]]] = {  # by layer, the dimension of the channels
    "resnet": (lambda: timm.create_model("test_resnet"), IMAGES, {"layer1": 1, "layer4": 1, "layer1.0.act1": 1}),
    "convnext": (lambda: timm.create_model("test_convnext"), IMAGES, {"stages.0": 1, "stages.1.blocks.0": 1}),
    "efficientnet": (lambda: timm.create_model("test_efficientnet"), IMAGES, {"blocks.1": 1, "conv_head": 1}),
    "vit": (lambda: timm.create_model("test_vit", img_size=64), IMAGES, {"blocks.0": 2, "norm": 2}),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1)),
        torch.randn(1, 3, 224, 224),
        {"layers.0": 3, "layers.3": 3, "patch_embed": 3, "norm": 3},
    ),
    "BERT": (bert, IDS, {"encoder.layer.1": 2, "encoder": 2, "embeddings": 2, "encoder.layer.0.intermediate": 2}),
    "GPT-2": (gpt2, IDS, {"h.0": 2, "h.0.mlp.c_fc": 2, "ln_f": 2}),
    "ViT": (lambda: ViTModel(ViTConfig(image_size=64, **SIZES)), IMAGES, {"embeddings": 2, "layernorm": 2}),
    "wav2vec 2": (
        lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES)),
        torch.randn(2, 4000),
        {"feature_extractor": 1, "feature_projection": 2, "encoder.layers.0": 2, "encoder": 2},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layouts(name: str):
    build, inputs, layers = NETWORKS[name]
    model = build().eval()
    capture = LayerRows(model, list(layers), Readout(pool="tokens"), needs_gradient=False)
    with capture.recording(), torch.no_grad():
        model(inputs)
    features = {label: calls[0].call.features for label, calls in capture._seen.items()}
    for label, (rows,) in capture.take().items():
        expected = features[label].movedim(layers[label], -1).flatten(end_dim=-2)
        torch.testing.assert_close(rows, expected, msg=lambda text, label=label: f"{label}: {text}")


@pytest.mark.parametrize("pool", ["mean", "last", "tokens"])
@pytest.mark.parametrize("layer", ["encoder.layer.1", "encoder", "encoder.layer.0.output"])
def test_padding_of_bert_changes_nothing(layer: str, pool: str):
    model, mask = bert().double().eval(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    capture = LayerRows(model, layer, Readout(pool=pool, mask="attention_mask"), needs_gradient=False)
    with capture.recording(), torch.no_grad():
        for padding in (0, 4, 19):
            more = torch.zeros(3, padding, dtype=torch.long)
            model(torch.cat([IDS, more], 1), attention_mask=torch.cat([mask, more], 1))
    rows, *others = capture.take()[layer]
    for other in others:
        torch.testing.assert_close(other, rows)
