import math

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from lightning_plugins.data import DocumentFrequencies
from lightning_plugins.functional import inverse_document_frequency

TEXTS = ["the cat sat", "the dog sat", "the end", "a cat and the dog and the cat"]


def test_by_hand():
    df = torch.tensor([1.0, 2.0, 4.0])
    expected = [math.log((4 - n + 0.5) / (n + 0.5) + 1) for n in (1, 2, 4)]
    torch.testing.assert_close(inverse_document_frequency(df, 4), torch.tensor(expected).double())
    plain = [math.log(4 / n) for n in (1, 2, 4)]
    torch.testing.assert_close(inverse_document_frequency(df, 4, variant="plain"), torch.tensor(plain).double())


def test_smooth_is_that_of_scikit_learn():
    vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None).fit(TEXTS)
    table = DocumentFrequencies.from_texts(TEXTS, str.split)
    assert table.words == vectorizer.get_feature_names_out().tolist()
    torch.testing.assert_close(table.idf(variant="smooth"), torch.tensor(vectorizer.idf_))


def test_counts_documents_not_words():
    table = DocumentFrequencies.from_texts(iter(TEXTS), str.split)
    assert (table.counts["the"], table.counts["cat"], table.num_documents) == (4, 2, 4)
    assert table.at_least(2).words == ["cat", "dog", "sat", "the"]
    torch.testing.assert_close(table.idf(["unknown"]), inverse_document_frequency(torch.tensor([0]), 4))


def test_refusals():
    with pytest.raises(ValueError, match="`variant` must be 'bm25', 'smooth' or 'plain', got 'bm52'"):
        inverse_document_frequency(torch.ones(1), 2, variant="bm52")
    with pytest.raises(ValueError, match="`document_frequency` must lie between 0 and `num_documents`=2"):
        inverse_document_frequency(torch.tensor([3]), 2)
    with pytest.raises(ValueError, match="`num_documents` must be at least 1"):
        inverse_document_frequency(torch.tensor([0]), 0)
    with pytest.raises(TypeError, match="`texts` must be documents, got one string"):
        DocumentFrequencies.from_texts("the cat", str.split)
    with pytest.raises(ValueError, match="`texts` must have at least one document"):
        DocumentFrequencies.from_texts([], str.split)
    with pytest.raises(ValueError, match="`counts` must lie between 1 and `num_documents`=2"):
        DocumentFrequencies({"a": 3}, 2)
