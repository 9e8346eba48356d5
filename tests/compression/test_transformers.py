"""Transformers of Hugging Face lose heads and hidden units exactly, and come again from a folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightning_plugins.compression import (
    channel_groups,
    find_channel_groups,
    load_compressed,
    save_compressed,
    shrink,
    update_configuration,
)
from tests.compression.networks import draw_kept

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "transformer_families.py"
_spec = importlib.util.spec_from_file_location("transformer_families", SCRIPT)
tool = sys.modules["transformer_families"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)
FAMILIES = {family.name: family for family in tool.families()}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_within_budget_exact_trained_and_saved(name):
    row = tool.try_family(FAMILIES[name])
    assert row.problem == ""
    assert row.heads >= 2
    assert row.perceptrons >= 2
    assert row.difference <= 1e-5


def build(name):
    torch.manual_seed(0)
    family = FAMILIES[name]
    return family.model(family.make()).eval(), family.inputs()


def test_heads_that_share_a_key_leave_together():
    model, inputs = build("Llama")
    (group,) = (g for g in channel_groups(model, inputs) if g.attention == "model.layers.0.self_attn")
    rows = {member.parameter.split(".")[-2]: member.units for member in group.members}
    assert group.size == 2
    assert rows["q_proj"] == rows["o_proj"] == (0,) * 16 + (1,) * 16
    assert rows["k_proj"] == rows["v_proj"] == (0,) * 8 + (1,) * 8


def test_fused_and_transposed_projections():
    model, inputs = build("GPT-2")
    (group,) = (g for g in channel_groups(model, inputs) if g.attention == "transformer.h.1.attn")
    members = {member.parameter.removeprefix("transformer.h.1.attn."): member for member in group.members}
    assert members["c_attn.weight"].dim == 1
    assert members["c_attn.weight"].units == members["c_attn.bias"].units == tuple(i % 32 // 8 for i in range(96))
    assert (members["c_proj.weight"].dim, members["c_proj.weight"].side) == (0, "in")
    shrink(model, [group], [torch.tensor([True, False, True, True])])
    attention = model.transformer.h[1].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (3, 24, 72, 24)


def test_attentions_that_hand_a_bias_on_lose_the_same_heads():
    model, inputs = build("T5")
    group = next(g for g in channel_groups(model, inputs) if g.attention.startswith("encoder"))
    assert {layer.split(".")[2] for layer in group.layers} == {"0", "1"}
    shrink(model, [group], [torch.tensor([False, True, True, False])])
    for block in model.encoder.block:
        assert (block.layer[0].SelfAttention.n_heads, block.layer[0].SelfAttention.inner_dim) == (2, 16)
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, 2)
    assert model.config.num_heads == 4
    outside = find_channel_groups(model, inputs, "encoder.block.0.*").refused
    assert "encoder.block.1" in outside["encoder.block.0.layer.0.SelfAttention.q"]


def test_keep_leaves_an_attention_whole():
    model, inputs = build("Mistral")
    groups = channel_groups(model, inputs, keep="model.layers.0.self_attn.k_proj")
    assert [g.attention for g in groups if g.attention] == ["model.layers.1.self_attn"]
    refused = find_channel_groups(model, inputs, keep="model.layers.0.self_attn.k_proj").refused
    assert "which is kept whole" in refused["model.layers.0.self_attn.q_proj"]


def test_the_configuration_says_what_it_can(tmp_path):
    model, inputs = build("Qwen 2")
    groups = channel_groups(model, inputs)
    shrink(model, groups, [torch.arange(group.size) >= group.size // 2 for group in groups])
    assert set(update_configuration(model)) >= {"num_attention_heads", "intermediate_size"}
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 8)
    assert update_configuration(model) == []
    save_compressed(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_what_differs_by_layer_stands_beside_the_configuration(tmp_path):
    model, inputs = build("Llama")
    before = model.config.to_dict()
    groups = channel_groups(model, inputs)
    kept = draw_kept(groups)
    kept[0], kept[2] = torch.tensor([True, False]), torch.tensor([True, True])
    shrink(model, groups, kept)
    save_compressed(model, tmp_path)
    assert model.config.num_key_value_heads == before["num_key_value_heads"]
    layers = json.loads((tmp_path / "structure.json").read_text())["layers"]
    assert [layers[f"model.layers.{i}.self_attn.k_proj"]["sizes"]["weight"][0] for i in (0, 1)] == [8, 16]
    again = load_compressed(transformers.LlamaForCausalLM, tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_compressed_language_models_generate():
    for name in ("GPT-2", "Llama"):
        model, inputs = build(name)
        groups = channel_groups(model, inputs)
        shrink(model, groups, draw_kept(groups))
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(cached, plain)


class Odd(nn.Module):
    """Heads whose number does not divide the width."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v))


def test_heads_that_do_not_divide_are_not_cut():
    search = find_channel_groups(nn.Sequential(nn.Linear(4, 8), Odd(), nn.Linear(8, 2)), torch.randn(2, 5, 4))
    assert not any(group.attention for group in search.groups)


@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_attentions_may_keep_different_numbers_of_heads(name):
    model, inputs = build(name)
    groups = channel_groups(model, inputs)
    kept = [torch.arange(group.size) >= (1 + index % 2) for index, group in enumerate(groups)]
    shrink(model, groups, kept)
    assert torch.isfinite(model(**inputs)[0]).all()
