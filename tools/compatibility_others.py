"""Cases of compatibility.py other than timm: transformers from configurations, and Lightning modules."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from compatibility_cases import CLASSES, ROWS, Case, Task
from lightning.pytorch.demos import boring_classes, lstm, transformer
from torch import Tensor

TOKENS, WORDS = 7, 50


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
    """Wraps the network of Lightning's MNIST example."""

    def __init__(self) -> None:
        super().__init__(boring_classes.Net())


class Translator(transformer.LightningTransformer):
    def prepare_data(self) -> None:
        """Fetch nothing."""


class Writer(lstm.LightningLSTM):
    def prepare_data(self) -> None:
        """Fetch nothing."""


def demo_cases() -> list[Case]:
    """Lightning's demo modules. Those that download data are given random data instead."""
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
