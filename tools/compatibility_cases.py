"""Cases of compatibility.py, each a network and one of its layers; those of timm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import timm
import timm.layers
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

ROWS, CLASSES = 6, 5

# One small model of every timm module, by the argument needed for 32 x 32 images: none, or `img_size`.
PLAIN = """
    lambda_resnet26t test_byobnet convmixer_768_32 test_convnext cpubone_nano crossvit_tiny_240 cs3darknet_s
    cspnext_tiny dla46x_c dpn48b edgenext_xx_small test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
    fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto lcnetv2_small lowformer_b0 test_mambaout poolformer_s12 mobilenetv3_small_050 mobilevit_xxs
    nasnetalarge nextvit_small test_nfnet pnasnet5large pvt_v2_b0 rdnet_tiny regnety_002 repghostnet_050 repvit_m1
    resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050
    swiftformer_xs tiny_vit_5m_224 test_vit ese_vovnet19b_slim_dw legacy_xception xception41
"""
SIZED = """
    coat_lite_tiny efficientformerv2_s0 gcvit_xxtiny levit_128s test_maxvit gmlp_ti16_224 mvitv2_tiny pit_ti_224
    visformer_tiny vitamin_small_224 volo_d1_224
"""
NARROW = {"embed_dim": 64, "depth": 2, "num_heads": 2}
SHALLOW = {"depths": (1, 1, 1, 1)}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, **SHALLOW}
SETTINGS: dict[str, dict[str, Any]] = {  # `size` is that of the images; the rest goes to `timm.create_model`
    "beit_base_patch16_224": {"img_size": 32, **NARROW},
    "cait_xxs24_224": {"img_size": 32, **NARROW},
    "convit_tiny": {"img_size": 32, "depth": 3},
    "csatv2": {"size": 64},
    "davit_tiny": {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), **SHALLOW},
    "deepseek_vit_412m": {"img_size": 28, **NARROW},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "densenet121": {"block_config": (1, 1, 1, 1)},
    "efficientformer_l1": {"size": 224},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "gemma4_vit_167m": {"embed_dim": 192, "depth": 2},
    "hiera_tiny_224": {"img_size": 32, "embed_dim": 32, "stages": (1, 1, 2, 1)},
    "hieradet_small": {"embed_dim": 32, "stages": (1, 1, 2, 1)},
    "inception_resnet_v2": {"size": 96},
    "inception_v3": {"size": 96},
    "inception_v4": {"size": 96},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "naflexvit_base_patch16_gap": NARROW,
    "nest_tiny": {"img_size": 64},
    "qwen3_vit_88m": {"embed_dim": 192, "depth": 2, "num_heads": 3},
    "res2next50": {"layers": (1, 1, 1, 1)},
    "samvit_base_patch16_224": {"img_size": 32, **NARROW},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "tnt_s_patch16_224": {"img_size": 32, "depth": 2},
    "tresnet_m": {"layers": (1, 1, 1, 1)},
    "twins_svt_small": SHALLOW,
    "vgg11": {"mlp_ratio": 0.0625},
    "vit_relpos_small_patch16_224": {"img_size": 32, **NARROW},
    "vit_tiny_r_s16_p8_224": {"img_size": 32, "depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
}
TIMM = {name: {} for name in PLAIN.split()} | {name: {"img_size": 32} for name in SIZED.split()} | SETTINGS
UNUSED = {"aux_head"}  # volo's second head, for token labelling, is not called in the plain forward pass


@dataclass(frozen=True)
class Case:
    """A network to test; ``refusal`` is the expected error text if it must be refused."""

    group: str
    family: str
    model: str
    layers: Sequence[str]
    build: Callable[[], pl.LightningModule]
    batch: Any
    pool: Any = "mean"
    rows: int = ROWS
    checkpointed: Callable[[], pl.LightningModule] | None = None  # the same network, recomputing its activations
    reentrant: bool = False  # with reentrant recomputation
    refusal: str | None = None


class Task(pl.LightningModule):
    """Minimal LightningModule around a timm or transformers classifier."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        output = self.backbone(**inputs) if isinstance(inputs, dict) else self.backbone(inputs)
        logits = getattr(output, "logits", output)
        return nn.functional.cross_entropy(logits, targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Reentrant(Task):
    """Makes timm use reentrant recomputation, which runs the forward pass without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        timm.layers.set_reentrant_ckpt(True)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            timm.layers.set_reentrant_ckpt(False)


def family(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def timm_task(name: str, task: type[Task] = Task, *, recompute: bool = False) -> Task:
    settings = {key: value for key, value in TIMM[name].items() if key != "size"}
    backbone = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
    if recompute:
        backbone.set_grad_checkpointing()
    return task(backbone)


def timm_layers(name: str) -> list[str]:
    """Inputs of the classifier, or of the classifiers: timm knows their names."""
    classifiers = timm.get_pretrained_cfg(name).classifier
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    return [f"backbone.{classifier}:input" for classifier in classifiers if classifier not in UNUSED]


def images(name: str) -> tuple[Tensor, Tensor]:
    size = TIMM[name].get("size", TIMM[name].get("img_size", 32))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, size, size, generator=generator), torch.arange(ROWS) % CLASSES


def timm_case(name: str, layers: Sequence[str] | None = None, *, group: str = "timm", **settings: Any) -> Case:
    layers = timm_layers(name) if layers is None else [f"backbone.{layer}" for layer in layers]
    return Case(group, family(name), name, layers, lambda: timm_task(name), images(name), **settings)


def timm_cases() -> list[Case]:
    return sorted((timm_case(name) for name in TIMM), key=lambda case: case.family)


def inner_cases() -> list[Case]:
    """Layers of timm networks other than the classifier's input, with ways to pool them."""
    swin, vit = "swin_tiny_patch4_window7_224", "test_vit"
    patches = (32 // 16) ** 2 + 1  # and the class token
    tried: list[tuple[str, str, dict[str, Any]]] = [
        ("test_resnet", "layer4", {}),
        ("test_resnet", "layer4", {"pool": "flatten"}),
        ("test_resnet", "layer1", {"pool": "tokens", "rows": ROWS * 8 * 8}),
        ("test_resnet", "act1", {}),
        ("test_resnet", "bn1", {"refusal": "changed in place"}),  # by the ReLU that follows
        (vit, "blocks.1", {"pool": "cls"}),
        (vit, "blocks.1", {"pool": "mean"}),
        (vit, "blocks.0.mlp.fc2", {"pool": "tokens", "rows": ROWS * patches}),
        (swin, "layers.3", {"pool": "mean_last"}),
        ("sequencer2d_s", "norm", {"pool": "mean_last"}),
        ("gcvit_xxtiny", "stages.3", {}),
    ]
    return [timm_case(name, [layer], group="timm, other layers", **settings) for name, layer, settings in tried]


def recomputing_cases() -> list[Case]:
    """Layers inside and outside of blocks whose activations timm recomputes in the backward pass."""
    swin = "swin_tiny_patch4_window7_224"
    tried: list[tuple[str, str, str, Any]] = [
        ("test_vit", "head:input", "blocks.0.attn.proj", "mean"),
        ("test_vit", "norm", "blocks.1", "cls"),
        ("test_resnet", "fc:input", "layer3.0", "mean"),
        ("test_convnext", "head.fc:input", "stages.1.blocks.0", "mean"),
        ("test_efficientnet", "classifier:input", "blocks.2.0", "mean"),
        ("densenet121", "classifier:input", "features.denseblock2.denselayer1.conv1", "mean"),
        (swin, "head.fc:input", "layers.1.blocks.0", "mean_last"),
    ]
    cases = []
    for name, outside, inside, pool in tried:
        for layer, task in ((outside, Task), (outside, Reentrant), (inside, Task), (inside, Reentrant)):
            cases.append(
                Case(
                    "recomputed activations",
                    family(name),
                    name,
                    [f"backbone.{layer}"],
                    lambda name=name: timm_task(name),
                    images(name),
                    pool="mean" if layer.endswith(":input") else pool,
                    checkpointed=lambda name=name, task=task: timm_task(name, task, recompute=True),
                    reentrant=task is Reentrant,
                    refusal="use_reentrant=False" if layer == inside and task is Reentrant else None,
                )
            )
    return cases
