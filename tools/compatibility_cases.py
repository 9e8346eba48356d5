"""The networks that compatibility.py tries: all are built from their configurations, with random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import timm
import timm.layers
import torch
import transformers
from lightning.pytorch.demos import boring_classes, lstm, transformer
from timm.models import model_entrypoint
from torch import Tensor, nn

ROWS, CLASSES, TOKENS, WORDS = 6, 5, 7, 50

# One small model of every module of timm, by what it must be told to see images of 32 x 32: nothing, or `img_size`.
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
SETTINGS: dict[str, dict[str, Any]] = {  # `size` is the images'; the rest goes to `timm.create_model`
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
UNUSED = {"aux_head"}  # volo's second head, of token labelling: the plain forward pass does not call it


@dataclass(frozen=True)
class Case:
    """A network to try; ``refusal`` is what the error must say if it is meant to be refused."""

    group: str
    family: str
    model: str
    layers: Sequence[str]
    build: Callable[[], pl.LightningModule]
    batch: Any
    pool: Any = "mean"
    rows: int = ROWS
    checkpointed: Callable[[], pl.LightningModule] | None = None  # the same network, recomputing its activations
    reentrant: bool = False  # in the older of the two ways
    refusal: str | None = None


class Task(pl.LightningModule):
    """The few lines that turn a classifier of timm or transformers into a LightningModule."""

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
    """Lets timm recompute activations in the older way, which runs the forward pass without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        timm.layers.set_reentrant_ckpt(True)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            timm.layers.set_reentrant_ckpt(False)


def mean_over_positions(features: Tensor) -> Tensor:
    """The `pool` for feature maps with channels last: (N, H, W, d) to (N, d)."""
    return features.mean(dim=(1, 2))


def family(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def timm_task(name: str, task: type[Task] = Task, *, recompute: bool = False) -> Task:
    settings = {key: value for key, value in TIMM[name].items() if key != "size"}
    backbone = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
    if recompute:
        backbone.set_grad_checkpointing()
    return task(backbone)


def timm_layers(name: str) -> list[str]:
    """What the classifier takes, or the classifiers: timm says how they are called."""
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
    """Layers of timm's networks other than the classifier's input, and the ways to pool them."""
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
        (swin, "layers.3", {"pool": mean_over_positions}),
        ("sequencer2d_s", "norm", {"pool": mean_over_positions}),
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
        (swin, "head.fc:input", "layers.1.blocks.0", mean_over_positions),
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


def transformers_task(architecture: str, recompute: dict[str, Any] | None = None) -> Task:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {"vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": CLASSES}
    short = {"bos_token_id": 1, "eos_token_id": 2}
    if architecture == "Bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **text))
    elif architecture == "ViT":
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **sizes)
        model = transformers.ViTForImageClassification(config)
    elif architecture == "GPT2":
        model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **text, **short))
    else:
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, **text, **short))
    if recompute is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
    return Task(model)


def transformers_batch(architecture: str) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    if architecture == "ViT":
        inputs = {"pixel_values": torch.randn(ROWS, 3, 32, 32, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, WORDS, (ROWS, TOKENS), generator=generator)}
    return inputs, torch.arange(ROWS) % CLASSES


def transformers_cases() -> list[Case]:
    tried = [
        ("Bert", "classifier:input", "mean"),
        ("Bert", "bert.encoder", "cls"),
        ("Bert", "bert.encoder.layer.1", "mean"),
        ("Bert", "bert.embeddings", "tokens"),
        ("Bert", "bert", "mean"),
        ("ViT", "classifier:input", "mean"),
        ("ViT", "vit", "cls"),
        ("ViT", "vit.layers.0.attention", "mean"),
        ("GPT2", "score:input", "mean"),
        ("GPT2", "transformer.h.1", "tokens"),
        ("Llama", "model.norm", "mean"),
        ("Llama", "model.layers.0.self_attn:input", "mean"),
    ]
    return [
        Case(
            "transformers",
            architecture,
            f"{architecture}Config",
            [f"backbone.{layer}"],
            lambda architecture=architecture: transformers_task(architecture),
            transformers_batch(architecture),
            pool=pool,
            rows=ROWS * TOKENS if pool == "tokens" else ROWS,
        )
        for architecture, layer, pool in tried
    ]


def recomputing_transformers_cases() -> list[Case]:
    cases = []
    for architecture, outside, inside in (  # transformers recomputes a block's `forward`: its hooks run outside
        ("Bert", "bert.encoder.layer.0", "bert.encoder.layer.0.attention"),
        ("ViT", "classifier:input", "vit.layers.1.mlp"),
        ("GPT2", "transformer.h.0", "transformer.h.0.mlp"),
        ("Llama", "model.norm", "model.layers.1.self_attn"),
    ):
        for layer, reentrant in ((outside, False), (outside, True), (inside, False), (inside, True)):
            cases.append(
                Case(
                    "recomputed activations",
                    architecture,
                    f"{architecture}Config",
                    [f"backbone.{layer}"],
                    lambda architecture=architecture: transformers_task(architecture),
                    transformers_batch(architecture),
                    checkpointed=lambda architecture=architecture, how={"use_reentrant": reentrant}: transformers_task(
                        architecture, how
                    ),
                    reentrant=reentrant,
                    refusal="use_reentrant=False" if layer == inside and reentrant else None,
                )
            )
    return cases


class Digits(Task):
    """Around the network that Lightning's MNIST example trains."""

    def __init__(self) -> None:
        super().__init__(boring_classes.Net())


class Translator(transformer.LightningTransformer):
    def prepare_data(self) -> None:
        """Fetch nothing."""


class Writer(lstm.LightningLSTM):
    def prepare_data(self) -> None:
        """Fetch nothing."""


def demo_cases() -> list[Case]:
    """Modules that come with Lightning. Those that fetch data are given random data instead."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, 32, generator=generator)
    words = torch.randint(WORDS, (2, ROWS, TOKENS), generator=generator)
    digits = torch.randn(ROWS, 1, 28, 28, generator=generator), torch.arange(ROWS)
    tried: list[tuple[str, Callable[[], pl.LightningModule], str, Any, str | None]] = [
        ("BoringModel", boring_classes.BoringModel, "layer", rows, None),
        (
            "ManualOptimBoringModel",
            boring_classes.ManualOptimBoringModel,
            "layer",
            rows,
            "subclass `lightning_plugins.*VNEMixin`",
        ),
        ("DemoModel", boring_classes.DemoModel, "l1", rows, None),
        ("Net", Digits, "backbone.fc2:input", digits, None),
        ("LightningTransformer", lambda: Translator(WORDS), "model.decoder:input", tuple(words), None),
        ("LightningTransformer", lambda: Translator(WORDS), "model.transformer.encoder", tuple(words), None),
        ("LightningLSTM", lambda: Writer(WORDS), "model.rnn", tuple(words), None),
    ]
    return [
        Case("Lightning", "demos", name, [layer], build, batch, refusal=refusal)
        for name, build, layer, batch, refusal in tried
    ]
