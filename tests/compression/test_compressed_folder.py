"""Compressed networks in folders: saved, loaded again bit for bit, and refused where something was changed."""

import copy
import json
import os
import pickle
import re
import warnings

import pytest
import safetensors.torch
import timm
import torch
import torch_pruning
import torchvision
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from lightning_plugins.compression import (
    channel_groups,
    factorize,
    load_compressed,
    restore_structure,
    save_compressed,
    shrink,
)
from tests.compression.networks import Residual, build, draw_kept

os.environ["HF_HUB_OFFLINE"] = "1"
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.arange(14).reshape(2, 7)


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, max_position_embeddings=16)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()


def assert_same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    shapes = [str(module) for module in (one, other)]
    assert shapes[0] == shapes[1]


def small_bert():
    model = bert()
    groups = channel_groups(model, {"input_ids": IDS})
    shrink(model, groups, draw_kept(groups))
    return factorize(model, 3, "encoder.layer.0.*")


@pytest.mark.parametrize("make", [BertModel, AutoModel], ids=["class", "auto"])
def test_a_transformer_with_fewer_heads_and_low_rank_layers_comes_again(tmp_path, make):
    model = small_bert()
    save_compressed(model, tmp_path / "small")
    before = torch.get_rng_state()
    again = load_compressed(make, tmp_path / "small")
    assert torch.equal(before, torch.get_rng_state())
    assert not again.training
    assert_same(model, again)
    assert again.encoder.layer[1].attention.self.num_attention_heads < 4
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0], rtol=0, atol=0)


def test_from_pretrained_refuses_what_the_configuration_cannot_say(tmp_path):
    save_compressed(small_bert(), tmp_path)
    assert (tmp_path / "compressed.safetensors").exists()
    with pytest.raises(OSError, match="no file named"):
        BertModel.from_pretrained(tmp_path)


def test_from_pretrained_loads_what_the_configuration_says(tmp_path):
    model = bert()
    save_compressed(model, tmp_path)
    assert_same(model, BertModel.from_pretrained(tmp_path))
    assert_same(model, load_compressed(BertModel, tmp_path))


def test_tied_embeddings_stay_tied(tmp_path):
    model = factorize(gpt2(), 3, ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"])
    save_compressed(model, tmp_path)
    assert json.loads((tmp_path / "structure.json").read_text())["tied"] == {"lm_head.weight": "transformer.wte.weight"}
    again = load_compressed(GPT2LMHeadModel, tmp_path)
    assert_same(model, again)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.generation_config.eos_token_id == 0


def test_ties_made_by_hand_and_types_come_again(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    model = net()
    model[2].weight = model[0].weight
    model.half()
    model[2].bias = nn.Parameter(model[2].bias.double())
    save_compressed(model, str(tmp_path))
    again = load_compressed(net, str(tmp_path))
    assert_same(model, again)
    assert again[2].weight is again[0].weight


def test_a_vision_network_in_other_types(tmp_path):
    model, x = build("residual")
    groups = channel_groups(model, x)
    shrink(model, groups, draw_kept(groups))
    save_compressed(model, tmp_path)
    again = load_compressed(Residual, tmp_path)
    assert_same(model, again)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_a_person_can_read_the_structure(tmp_path):
    save_compressed(small_bert(), tmp_path)
    text = (tmp_path / "structure.json").read_text()
    (line,) = [line for line in text.splitlines() if '"encoder.layer.0.attention.output.dense"' in line]
    entry = json.loads("{" + line.strip().rstrip(",") + "}")["encoder.layer.0.attention.output.dense"]
    assert (entry["kind"], entry["rank"]) == ("low-rank Linear", 3)
    heads = json.loads(text)["layers"]["encoder.layer.1.attention.self"]["heads"]
    assert heads["all_head_size"] == 8 * heads["num_attention_heads"]


def test_save_pretrained_called_directly_warns(tmp_path):
    model = small_bert()
    for other in (model, copy.deepcopy(model), nn.Sequential(model)[0]):
        with pytest.warns(UserWarning, match="save_compressed"):
            other.save_pretrained(tmp_path)
    assert copy.deepcopy(model).save_pretrained.__self__ is not model
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert().save_pretrained(tmp_path)
        restore_structure(bert(), bert().state_dict()).save_pretrained(tmp_path)  # marked, and nothing to say


def test_saving_again_replaces_everything(tmp_path):
    save_compressed(bert(), tmp_path)
    save_compressed(small_bert(), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_compressed(BertModel, tmp_path), small_bert())


def change_structure(change):
    def tamper(folder):
        path = folder / "structure.json"
        stored = json.loads(path.read_text())
        change(stored)
        path.write_text(json.dumps(stored))

    return tamper


def cut_a_tensor(folder):
    path = folder / "compressed.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop("pooler.dense.bias")
    safetensors.torch.save_file(tensors, path)


LAYER = "encoder.layer.1.attention.self"
TAMPERED = {
    "nothing there": (lambda f: [p.unlink() for p in f.iterdir()], "has no structure.json: nothing"),
    "no structure": (lambda f: (f / "structure.json").unlink(), "has no structure.json: compressed.saf"),
    "no tensors": (lambda f: (f / "compressed.safetensors").unlink(), "compressed.safetensors, which .* is missing"),
    "other tensors": (cut_a_tensor, "SHA-256 differs"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "structure.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "structure.json").write_text("[]"), "must hold an object, got list"),
    "an entry gone": (change_structure(lambda s: s.pop("tied")), r"must have 'tied' \(dict\), got None"),
    "another format": (change_structure(lambda s: s.update(format="2")), "must be of the format"),
    "another file": (change_structure(lambda s: s["weights"].update(file="../x")), "must name model.safetensors or"),
    "rank": (change_structure(lambda s: s["layers"]["encoder.layer.0.output.dense"].update(rank=9)), "has rank 3, the"),
    "heads": (change_structure(lambda s: s["layers"][LAYER]["heads"].update(num_attention_heads=0)), "positive|an int"),
    "layer gone": (change_structure(lambda s: s["layers"].pop("pooler.dense")), "'pooler.dense' .* is not in the file"),
    "layer added": (change_structure(lambda s: s["layers"].update(x={"sizes": {}})), "'x' .* is not there"),
    "no sizes": (change_structure(lambda s: s["layers"]["pooler.dense"].pop("sizes")), "sizes of the layer 'pooler"),
    "ties": (change_structure(lambda s: s.update(tied={"a": "b"})), "ties 'a' to 'b'"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_changed_is_named(tmp_path, tamper, message):
    save_compressed(small_bert(), tmp_path)
    tamper(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_compressed(BertModel, tmp_path)


def test_a_wrong_number_of_heads_is_not_believed(tmp_path):
    save_compressed(small_bert(), tmp_path)
    change_structure(lambda s: s["layers"][LAYER]["heads"].update(attention_head_size=4))(tmp_path)
    with pytest.raises(ValueError, match="attention_head_size"):
        load_compressed(BertModel, tmp_path)


def test_another_network_is_named(tmp_path):
    save_compressed(small_bert(), tmp_path)
    with pytest.raises(ValueError, match="holds a BertModel of another structure than `model` builds"):
        load_compressed(Residual, tmp_path)
    with pytest.raises(TypeError, match="without arguments"):
        load_compressed(nn.Linear, tmp_path)
    with pytest.raises(TypeError, match=r"must return a torch.nn.Module, got int"):
        load_compressed(int, tmp_path)
    with pytest.raises(TypeError, match=r"a class or function .* got BertModel"):
        load_compressed(bert(), tmp_path)
    with pytest.raises(TypeError, match="`folder` must be a path, got 3"):
        load_compressed(BertModel, 3)
    with pytest.raises(ValueError, match="must be a folder that `save_compressed` has written"):
        load_compressed(BertModel, tmp_path / "config.json")


def test_what_cannot_be_saved_is_named(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return 3

    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got dict"):
        save_compressed({}, tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_compressed(nn.Linear(2, 2, device="meta"), tmp_path)
    with pytest.raises(ValueError, match="got int at '_extra_state'"):
        save_compressed(Stateful(2, 2), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_compressed(nn.Linear(2, 2), tmp_path / "file")


def small_densenet():
    return torchvision.models.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5)


def timm_model(name):
    return lambda: timm.create_model(name, num_classes=5)


OTHERS = {
    "ResNet": timm_model("resnet10t"),
    "MobileNet": timm_model("mobilenetv2_035"),
    "ConvNeXt": timm_model("convnext_atto"),
    "DenseNet": small_densenet,
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_pruned_by_torch_pruning_load_again(tmp_path, name):
    torch.manual_seed(0)
    pruned, x = OTHERS[name]().eval(), torch.randn(1, 3, 64, 64)
    head = [module for module in pruned.modules() if isinstance(module, nn.Linear) and module.out_features == 5]
    torch_pruning.pruner.BasePruner(
        pruned, x, importance=torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.4, ignored_layers=head
    ).step()
    assert sum(p.numel() for p in pruned.parameters()) < 0.6 * sum(p.numel() for p in OTHERS[name]().parameters())
    state = pruned.state_dict()
    again = restore_structure(OTHERS[name](), state).eval()
    again.load_state_dict(state)
    assert torch.equal(again(x), pruned(x))
    save_compressed(pruned, tmp_path)
    assert torch.equal(load_compressed(OTHERS[name], tmp_path)(x), pruned(x))


def test_vit_in_a_lightning_like_holder(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ViTModel(
                ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=8)
            )

    model = factorize(Holder(), 4, "net.layers.*")
    save_compressed(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert_same(load_compressed(Holder, tmp_path), model)
    with pytest.warns(UserWarning, match=re.escape("a compressed ViTModel")):
        model.net.save_pretrained(tmp_path)
