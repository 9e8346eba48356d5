"""Small networks with residual blocks, what they must be given, and the names of their blocks."""

from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


class Block(nn.Module):
    """A residual perceptron; as a tuple with something else if asked."""

    def __init__(self, width: int, hidden: int, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.as_tuple = nn.Linear(width, hidden), nn.Linear(hidden, width), as_tuple

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = x + scale * self.down(torch.tanh(self.up(x)))
        return (x, None) if self.as_tuple else x


class Deep(nn.Module):
    """A stem, blocks on a stream that two of them share with the stem, and a head."""

    def __init__(self, blocks: int = 3, width: int = 6, hidden: int = 8, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, hidden, as_tuple=as_tuple) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return self.head(x)


class Case(NamedTuple):
    """A network in float64 and evaluation mode, its inputs, and a glob over its blocks."""

    net: nn.Module
    inputs: Any
    blocks: str


def bert(layers: int = 3) -> Any:
    return BertModel(BertConfig(vocab_size=20, num_hidden_layers=layers, max_position_embeddings=12, **_SIZES))


def gpt2(layers: int = 3) -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=layers, n_head=2, n_positions=16, **ends))


def vit(layers: int = 3) -> Any:
    return ViTModel(ViTConfig(image_size=8, patch_size=4, num_hidden_layers=layers, **_SIZES))


def timm_vit() -> Any:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def resnet() -> Any:
    kind = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(kind, [2, 2, 1, 1], num_classes=3)


IDS = torch.arange(10).reshape(2, 5)
BUILDERS = {
    "deep": (Deep, torch.ones(2, 4), "blocks.*"),
    "tuples": (lambda: Deep(as_tuple=True), torch.ones(2, 4), "blocks.*"),
    "bert": (bert, {"input_ids": IDS}, "encoder.layer.*"),
    "gpt2": (gpt2, {"input_ids": IDS, "use_cache": False}, "transformer.h.*"),
    "vit": (vit, (torch.ones(2, 3, 8, 8),), "layers.*"),
    "timm": (timm_vit, torch.ones(2, 3, 16, 16), "blocks.*"),
    "resnet": (resnet, torch.ones(2, 3, 32, 32), "layer?.*"),
}


def build(name: str) -> Case:
    """A network with weights of which all count, on inputs that differ."""
    make, inputs, blocks = BUILDERS[name]
    torch.manual_seed(0)
    net = make().double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    if isinstance(inputs, Tensor):
        inputs = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    if isinstance(inputs, tuple):
        inputs = (torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64),)
    return Case(net, inputs, blocks)
