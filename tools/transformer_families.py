"""Remove heads and hidden units from small Hugging Face transformers, and compare the result with the prediction.

Nothing is downloaded: every model is built from a small configuration. For each the groups are found, random units are
masked, and the model is shrunk to a budget. The smaller model must compute the same as the masked one, its parameters
must be within the budget and equal its prediction, it must be restored from a folder written by `save_compressed`, and
it must train. In a second copy the last block of every stack is skipped, as far as it can be. `--markdown` writes the
table into docs/transformers.md.
"""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn

from lightning_plugins.compression import (
    Budget,
    apply_masks,
    bake_masks,
    find_blocks,
    find_channel_groups,
    load_compressed,
    project,
    save_compressed,
    shrink,
    skip_blocks,
)
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.tracing import tensors_in

TARGET, TOLERANCE = 0.75, 1e-5
PAGE = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"
HEAD = """# Which transformers can lose heads and hidden units

Written by `tools/transformer_families.py`: one small model of each family of transformers {version}, built from a
configuration, with random weights. Units of all groups are removed in random order until three quarters of the
parameters are left. *Heads* and *perceptrons* are the numbers of groups of each kind; heads that share a key and a
value are removed together, and the attention layers of T5, which pass a bias on, lose the same heads. *Difference*
compares the smaller model's outputs with those of the masked one, in float64, relative to the largest. *Configuration*
is the part of the structure that the configuration can express, if all layers lose equally many; the rest is in
`structure.json`. Every model was trained for two steps before and after, and `save_compressed` and `load_compressed`
restored it bit for bit. *Blocks* is the number of blocks that can be removed as a whole, of those that there are; the
last one of each stack was removed, with the same comparisons. In T5 all blocks but the last pass on a bias that the
first one computes.

Residual streams are not pruned, since norms compute their statistics over them, nor are embeddings tied to them.
"""
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {**SMALL, "max_position_embeddings": 32}
IMAGE = {**{key: value for key, value in SMALL.items() if key != "vocab_size"}, "image_size": 16, "patch_size": 8}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CAUSAL = {**TEXT, "num_key_value_heads": 2, **SPECIAL}


class Family(NamedTuple):
    name: str
    model: Any
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 17).reshape(2, 7)}


def both() -> dict[str, Tensor]:
    return {**words(), "decoder_input_ids": words()["input_ids"]}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sounds() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": words()["input_ids"]}


def clip() -> Any:
    text = {**TEXT, **SPECIAL, "projection_dim": 16}
    return transformers.CLIPConfig(text_config=text, vision_config={**IMAGE, "projection_dim": 16}, projection_dim=16)


def whisper() -> Any:
    sides = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))}
    own = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "vocab_size": 50}
    lengths = {"max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1}
    return transformers.WhisperConfig(**sides, **own, **lengths, **SPECIAL)


def families() -> list[Family]:
    t = transformers
    small_t5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    gpt2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    distil = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    qwen = {**CAUSAL, "tie_word_embeddings": True}
    return [
        Family("BERT", t.BertModel, lambda: t.BertConfig(**TEXT), words),
        Family("DistilBERT", t.DistilBertModel, lambda: t.DistilBertConfig(**distil), words),
        Family("GPT-2", t.GPT2LMHeadModel, lambda: t.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=1), words),
        Family("ViT", t.ViTModel, lambda: t.ViTConfig(**IMAGE), pictures),
        Family("T5", t.T5ForConditionalGeneration, lambda: t.T5Config(**small_t5), both),
        Family(
            "T5 gated",
            t.T5ForConditionalGeneration,
            lambda: t.T5Config(**small_t5, feed_forward_proj="gated-gelu"),
            both,
        ),
        Family("CLIP", t.CLIPModel, clip, lambda: {**words(), **pictures()}),
        Family("Whisper", t.WhisperForConditionalGeneration, whisper, sounds),
        Family("Llama", t.LlamaForCausalLM, lambda: t.LlamaConfig(**CAUSAL), words),
        Family("Mistral", t.MistralForCausalLM, lambda: t.MistralConfig(**CAUSAL), words),
        Family("Qwen 2", t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**qwen), words),
        Family("Qwen 3", t.Qwen3ForCausalLM, lambda: t.Qwen3Config(**CAUSAL, head_dim=8), words),
    ]


class Row(NamedTuple):
    family: str
    heads: int = 0
    perceptrons: int = 0
    parameters: str = ""
    difference: float = float("inf")
    configuration: str = ""
    blocks: str = ""
    problem: str = ""


def train_two_steps(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raise an error if any used weight does not change, or becomes infinite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = [leaf for leaf in tensors_in(model(**inputs)) if leaf.requires_grad]
        torch.stack([leaf.square().mean() for leaf in outputs]).sum().backward()
        optimizer.step()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise RuntimeError("training gives weights that are not finite")


def smaller(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, list[Any], float, tuple[int, int, int]]:
    """The shrunk model, its groups, the difference, and parameters: predicted, counted, dense."""
    groups = find_channel_groups(model, inputs).groups
    budget = Budget(model, groups, target=TARGET)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(group.size, generator=generator) for group in groups]
    chosen = project(budget, [torch.ones(group.size, dtype=torch.bool) for group in groups], scores)
    small = copy.deepcopy(model)
    apply_masks(small, groups).set_kept(chosen.kept)
    expected = tensors_in(run(small, inputs))
    bake_masks(small)
    shrink(small, groups, chosen.kept)
    got = tensors_in(run(small, inputs))
    pairs = list(zip(expected, got, strict=True))
    difference = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
    counted = sum(parameter.numel() for parameter in small.parameters())
    return small, groups, difference, (int(chosen.cost), counted, int(budget.dense))


def come_again(model: nn.Module, kind: Any, inputs: dict[str, Tensor]) -> None:
    with TemporaryDirectory() as folder:
        save_compressed(model, folder)
        again = load_compressed(kind, folder)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        if not torch.equal(one, other):
            raise RuntimeError(f"{name} differs behind save_compressed and load_compressed")
    for one, other in zip(tensors_in(run(model, inputs)), tensors_in(run(again, inputs)), strict=True):
        if not torch.equal(one, other):
            raise RuntimeError("outputs differ behind save_compressed and load_compressed")


def first_again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The input of a block instead of its output."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def without_blocks(model: nn.Module, inputs: dict[str, Tensor], kind: Any) -> tuple[str, float]:
    """Skip the last block of every stack: the number of blocks that can be skipped, of all, and the difference."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = sum(len(model.get_submodule(name)) for name in stacks)
    found = [group.block for group in find_blocks(model, inputs, [f"{name}.*" for name in stacks]).groups]
    last = list({name.rpartition(".")[0]: name for name in found}.values())
    small = skip_blocks(copy.deepcopy(model), last, inputs)
    handles = [model.get_submodule(name).register_forward_hook(first_again, with_kwargs=True) for name in last]
    pairs = list(zip(tensors_in(run(model, inputs)), tensors_in(run(small, inputs)), strict=True))
    for handle in handles:
        handle.remove()
    train_two_steps(small, inputs)
    with TemporaryDirectory() as folder:
        save_compressed(small, folder)
        again = load_compressed(kind, folder)
    pairs += zip(tensors_in(run(small, inputs)), tensors_in(run(again, inputs)), strict=True)
    difference = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
    return f"{len(found)} of {blocks}", difference


def expressed(model: nn.Module, groups: list[Any], kind: Any) -> str:
    """Find out whether the configuration can express a model in which every layer lost half of its units."""
    before = copy.deepcopy(model.config.to_dict())
    shrink(model, groups, [torch.arange(group.size) >= group.size // 2 for group in groups])
    with TemporaryDirectory() as folder:
        save_compressed(model, folder)
        whole = Path(folder, "model.safetensors").exists()
        if whole and not all(
            torch.equal(one, other)
            for one, other in zip(
                model.state_dict().values(), kind.from_pretrained(folder).state_dict().values(), strict=True
            )
        ):
            raise RuntimeError("from_pretrained gives another model than the configuration says")
    nested = {**before, **before.get("text_config", {})}
    now = {**model.config.to_dict(), **model.config.to_dict().get("text_config", {})}
    names = [key for key, value in now.items() if isinstance(value, int) and nested.get(key) != value]
    return "all, by " * whole + (", ".join(f"`{name}`" for name in sorted(names)) or "nothing")


def try_family(family: Family) -> Row:
    torch.manual_seed(0)
    model, inputs = family.model(family.make()).double().eval(), family.inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    train_two_steps(model, inputs)
    small, groups, difference, (promised, counted, dense) = smaller(model, inputs)
    heads = sum(bool(group.attention) for group in groups)
    row = Row(family.name, heads, len(groups) - heads, f"{counted:,} ({counted / dense:.1%})", difference)
    if counted != promised or counted > TARGET * dense:
        return row._replace(problem=f"the budget promised {promised:,} of {dense:,} and {counted:,} are left")
    if not difference <= TOLERANCE:
        return row._replace(problem=f"outputs differ by {difference:.1e}")
    come_again(small, family.model, inputs)
    train_two_steps(small, inputs)
    come_again(small, family.model, inputs)
    blocks, difference = without_blocks(model, inputs, family.model)
    if not difference <= TOLERANCE:
        return row._replace(problem=f"outputs without blocks differ by {difference:.1e}")
    return row._replace(blocks=blocks, configuration=expressed(copy.deepcopy(model), groups, family.model))


def markdown(rows: list[Row]) -> str:
    lines = [HEAD.format(version=transformers.__version__)]
    lines += ["| family | heads | perceptrons | blocks | parameters | difference | configuration |", "|" + "---|" * 7]
    for row in rows:
        cells = (row.family, row.heads, row.perceptrons, row.blocks, row.parameters, f"{row.difference:.0e}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row.configuration} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.name} as well")
    parser.add_argument("--only", default="", help="families with this in their names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rows = []
    for family in families():
        if arguments.only in family.name:
            row = try_family(family)
            rows.append(row)
            print(
                *row[:4],
                f"{row.difference:.0e}",
                row.configuration,
                row.blocks,
                row.problem or "exact",
                sep="  ",
                flush=True,
            )
    if arguments.markdown:
        PAGE.write_text(markdown(rows), encoding="utf-8")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
