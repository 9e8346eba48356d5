import numpy as np
import pytest
import torch
from scipy import stats

from lightning_plugins.functional import cls_attention_correlation
from lightning_plugins.metrics import CLSAttentionCorrelation


def texts(n=5, heads=3, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(n, heads, length, length, generator=generator).softmax(-1)
    values = torch.randint(6, (n, length), generator=generator).double()  # ties
    tokens = torch.randint(8, (n, length), generator=generator)
    mask = torch.rand(n, length, generator=generator) < 0.8
    mask[:, 0] = False
    return attention, values, mask, tokens


def by_hand(attention, values, mask, tokens, query=0):
    rows = np.full(attention.shape[:2], np.nan)
    for n in range(len(attention)):
        kept = [int(i) for i in mask[n].nonzero()]
        kinds = sorted({int(tokens[n, i]) for i in kept})
        places = [[i for i in kept if tokens[n, i] == kind] for kind in kinds]
        y = [np.mean([float(values[n, i]) for i in own]) for own in places]
        for head in range(attention.shape[1]):
            x = [np.mean([float(attention[n, head, query, i]) for i in own]) for own in places]
            rows[n, head] = stats.spearmanr(x, y).statistic
    return rows


@pytest.mark.parametrize("query", [0, 3])
def test_is_spearman_of_means_by_token(query):
    attention, values, mask, tokens = texts()
    found = cls_attention_correlation(attention, values, mask, tokens, query=query)
    np.testing.assert_allclose(found.numpy(), by_hand(attention, values, mask, tokens, query), atol=1e-12)


def test_without_tokens_every_position_counts():
    attention, values, mask, _ = texts()
    found = cls_attention_correlation(attention, values, mask)
    places = torch.arange(12).expand(5, 12)
    np.testing.assert_allclose(found.numpy(), by_hand(attention, values, mask, places), atol=1e-12)
    values[~mask] = torch.nan  # what is left out may be anything
    torch.testing.assert_close(cls_attention_correlation(attention, values, mask), found)


def test_texts_without_a_correlation_are_nan_and_left_out_of_the_mean():
    attention, values, mask, tokens = texts()
    mask[0], values[1] = False, 2.0
    metric = CLSAttentionCorrelation(num_layers=2, num_heads=3)
    metric.update([attention[:2], attention[:2]], values[:2], mask[:2], tokens[:2])
    metric.update([attention[2:], attention[2:]], values[2:], mask[2:], tokens[2:])
    found = metric.compute()
    expected = by_hand(attention[2:], values[2:], mask[2:], tokens[2:])
    assert found.texts.unique().tolist() == [3]
    np.testing.assert_allclose(found.mean[1].numpy(), expected.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.standard_error[0].numpy(), stats.sem(expected), atol=1e-12)


def test_refusals():
    attention, values, mask, _ = texts()
    with pytest.raises(ValueError, match=r"`attention` must have shape \(N, heads, L, L\)"):
        cls_attention_correlation(attention[0], values)
    with pytest.raises(ValueError, match=r"`values` must have shape \(5, 12\)"):
        cls_attention_correlation(attention, values[:, 1:])
    with pytest.raises(ValueError, match=r"`mask` must have shape \(5, 12\)"):
        cls_attention_correlation(attention, values, mask[1:])
    with pytest.raises(ValueError, match="`query` must be one of the 12 positions, got 12"):
        cls_attention_correlation(attention, values, query=12)
    with pytest.raises(ValueError, match="`attentions` must have `num_layers`=2 entries, got 1"):
        CLSAttentionCorrelation(2, 3).update([attention], values)
    with pytest.raises(ValueError, match="`attentions` must have `num_heads`=2 heads, got 3"):
        CLSAttentionCorrelation(1, 2).update([attention], values)
