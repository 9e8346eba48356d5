"""Two other packages that compress networks, on networks as people have them: NVIDIA Model-Optimizer and fasterai.

Model-Optimizer's FastNAS searches for numbers of channels of a convolutional network under a limit on FLOPs. The first
table shows the smallest share of a network's FLOPs in its search space, with its choices at their finest, beside the
smallest network that channel groups here and Torch-Pruning's dependencies reach with as few channels left. fasterai
truncates the weights of linear layers (`FC_Decomposer`), plainly or scaled by the sizes of their inputs. The second
table shows retrieval with a sentence encoder of which a share of the weights is left, as in `minilm.py`. Both packages
have many requirements that these parts do not need:

    pip install --no-deps --target FOLDER nvidia-modelopt pulp omegaconf torchprofile==0.0.4
    pip install --no-deps --target FOLDER fasterai fastai fastcore fastprogress fasttransform plum-dispatch \\
        fastdownload beartype einops python-fasthtml itsdangerous starlette python_multipart
    PYTHONPATH=$PWD:FOLDER python benchmarks/other_compressors.py     # docs/benchmarks/other_compressors.md
"""

import argparse
import copy
import math
import warnings
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torchvision
from _report import describe_machine, markdown_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import Calibration, channel_groups, equal_ratio, factorize, shrink

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "other_compressors.md"
NETWORKS = ("timm/test_resnet", "timm/resnet18", "timm/mobilenetv3_small_050", "timm/test_vit", "torchvision/resnet18")
WEIGHTS = (0.8, 0.6)
LEAST = 0.05  # of a layer's channels
TEXT = """# Beside Model-Optimizer and fasterai

`python benchmarks/other_compressors.py`: {machine}; nvidia-modelopt {modelopt}, fasterai {fasterai}, Torch-Pruning
{pruning}.

**The smallest share of the FLOPs that each can leave.** Model-Optimizer's FastNAS looks for numbers
of channels in a space that it finds by tracing the network. All three leave at least a twentieth of the channels of a
layer, FastNAS without its default rounding to multiples of 32.

{reach}

**fasterai's truncation of linear layers**, MRR of five sets of 150 paragraphs, dense {dense:.3f}. The encoder's linear
layers are factorised at one rank for each shape, without training. Its activation-aware form takes the second dimension
of a layer's input for the features and so needs inputs of shape (N, d); on tokens, (N, L, d), it {outcome}.

{retrieval}
"""


def load(name: str) -> nn.Module:
    package, _, network = name.partition("/")
    torch.manual_seed(0)
    made = timm.create_model(network) if package == "timm" else torchvision.models.get_model(network)
    return made.eval()


def size_of(name: str) -> int:
    return timm.get_pretrained_cfg(name.partition("/")[2]).input_size[-1] if name.startswith("timm/test") else 64


def flops(model: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return int(counter.get_total_flops())


def fastnas(model: nn.Module, inputs: torch.Tensor) -> str:
    """The smallest network in the search space of FastNAS, exported."""
    import modelopt.torch.nas as nas
    from modelopt.torch.prune.fastnas import FastNASConfig

    settings = FastNASConfig().model_dump(by_alias=True)
    for rules in settings.values():
        for rule in rules.values():
            rule.update({key: 1 for key in rule or () if key.endswith("_divisor")})
    dense = flops(model, inputs)
    space = nas.convert(model, [("fastnas", settings)])
    nas.sample(space, min)
    return f"{flops(nas.export(space), inputs) / dense:.3f}"


def ours(model: nn.Module, inputs: torch.Tensor) -> str:
    dense = flops(model, inputs)
    groups = channel_groups(model, inputs)
    kept = [torch.arange(group.size) < math.ceil(LEAST * group.size) for group in groups]
    shrink(model, groups, kept)
    return f"{flops(model, inputs) / dense:.3f}"


def torch_pruning(model: nn.Module, inputs: torch.Tensor) -> str:
    import torch_pruning as tp

    dense = flops(model, inputs)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(), pruning_ratio=1 - LEAST, ignored_layers=[last]
    )
    pruner.step()
    return f"{flops(model, inputs) / dense:.3f}"


def reach() -> str:
    lines = []
    for name in NETWORKS:
        side = size_of(name)
        inputs = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        cells = [method(load(name), inputs) for method in (fastnas, ours, torch_pruning)]
        lines.append([name, str(side), *cells])
        print(lines[-1], flush=True)
    return markdown_table(["network", "pixels", "FastNAS", "`channel_groups`", "Torch-Pruning"], lines)


def fasterai_part() -> tuple[str, float, str]:
    """The table of retrieval, the dense encoder's MRR, and how the activation-aware form ends on tokens."""
    from fasterai.misc.all import FC_Decomposer
    from minilm import LAYERS, PARAGRAPHS, Encoder, cosines, mean_reciprocal_rank, retrieval_set, training_texts

    encoder = Encoder()
    sets = [retrieval_set(PARAGRAPHS, seed) for seed in range(5)]

    def score(model: nn.Module) -> float:
        return sum(mean_reciprocal_rank(cosines(encoder, model, one)) for one in sets) / len(sets)

    def weights(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.encoder.parameters() if parameter.ndim == 2)

    def theirs(left: float) -> nn.Module:
        low, high = 0.0, 0.99
        for _ in range(12):
            middle = (low + high) / 2
            made = FC_Decomposer().decompose(encoder.dense, percent_removed=middle, exclude=["pooler.dense"])
            low, high = (low, middle) if weights(made) <= left * weights(encoder.dense) else (middle, high)
        return FC_Decomposer().decompose(encoder.dense, percent_removed=high, exclude=["pooler.dense"])

    calibration = Calibration(encoder.dense, LAYERS, mask="attention_mask")
    calibration.record(list(encoder.batches(sorted(training_texts()[:1024], key=len))))
    lines = []
    for left in WEIGHTS:
        ranks = equal_ratio(encoder.dense, budget=left, layers=LAYERS).ranks
        plain = factorize(copy.deepcopy(encoder.dense), ranks)
        aware = factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)
        made = {"fasterai": theirs(left), "`factorize`": plain, "`factorize`, calibrated": aware}
        for name, model in made.items():
            kept = weights(model) / weights(encoder.dense)
            lines.append([name, f"{left:.0%}", f"{kept:.3f}", f"{score(model):.3f}"])
            print(lines[-1], flush=True)
    try:  # on a layer of its own: its hooks stay where it fails
        FC_Decomposer().decompose(nn.Sequential(nn.Linear(8, 8)), data=torch.randn(4, 7, 8))
    except RuntimeError as error:
        outcome = f"raises `{type(error).__name__}: {str(error).splitlines()[0]}`"
    else:
        outcome = "returns"
    header = ["method", "weights asked for", "weights left", "MRR"]
    return markdown_table(header, lines), score(encoder.dense), outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = reach()
    retrieval, dense, outcome = fasterai_part()
    names = {"modelopt": "nvidia-modelopt", "fasterai": "fasterai", "pruning": "torch-pruning"}
    versions = {name: version(package) for name, package in names.items()}
    text = TEXT.format(
        machine=describe_machine("cpu"), reach=found, retrieval=retrieval, dense=dense, outcome=outcome, **versions
    )
    options.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
