"""CLAM, TransMIL, DSMIL and the pooling baselines: what is theirs alone."""

import pytest
import torch
from torch.nn import functional as F

from saccade.errors import ConfigError
from saccade.mil import CLAMMB, CLAMSB, DSMIL, MaxPooling, MeanPooling, TransMIL
from saccade.mil.clam import smooth_top1_svm
from saccade.mil.transmil import NystromAttention


def bags(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 2, 3, 15, 40])
@pytest.mark.parametrize("subtyping", [False, True])
def test_clam_never_calls_a_tile_both_positive_and_negative(count, subtyping):
    model = CLAMMB(6, 3, (8, 4), subtyping=subtyping).eval()
    output = model(bags(2, count, 6))
    losses = model.loss(output, torch.tensor([0, 2]))
    assert losses["loss"].isfinite()
    _, labels, counts = model.instance_predictions(output, torch.tensor([0, 2]))
    expected = min(8, count // 2)
    assert counts[0, 0].sum() == 2 * expected
    assert counts[0, 1].sum() == (expected if subtyping else 0)
    assert labels[0, 0][counts[0, 0]].sum() == expected
    assert (losses["instance"] == 0) == (count == 1)


def test_clam_takes_the_ends_of_the_attention():
    model = CLAMSB(6, 2, (8, 4), instances=2).eval()
    output = model(bags(1, 9, 6))
    logits, labels, _ = model.instance_predictions(output, torch.tensor([1]))
    order = output.scores[0, 0].argsort(descending=True)
    tiles = output.instance_features[0, torch.cat([order[:2], order.flip(0)[:2]])]
    torch.testing.assert_close(logits[0, 1], model.instance_classifiers[1](tiles))
    assert labels[0, 1].tolist() == [1, 1, 0, 0]


def test_clam_mb_has_a_row_and_a_unit_for_each_class():
    model = CLAMMB(6, 3, (8, 4)).eval()
    output = model(bags(2, 9, 6))
    assert output.scores.shape == (2, 3, 9)
    by_hand = torch.cat([model.classifiers[c](output.features[:, c]) for c in range(3)], 1)
    torch.testing.assert_close(output.logits, by_hand)


def test_clam_keys_follow_the_official_sequence():
    assert "attention_net.3.module.3.weight" in CLAMSB(6, 2, (8, 4), gated=False).state_dict()
    assert "attention_net.3.module.2.weight" in CLAMSB(6, 2, (8, 4), gated=False, dropout=0).state_dict()
    with pytest.raises(ConfigError, match="'small', 'big' or two widths"):
        CLAMSB(6, 2, "tiny")


def test_smooth_svm():
    logits, target = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([0, 1])
    expected = torch.tensor([1 + torch.exp(torch.tensor(-2.0)), 1 + torch.exp(torch.tensor(1.0))]).log()
    torch.testing.assert_close(smooth_top1_svm(logits, target), expected)
    model = CLAMSB(6, 2, (8, 4), instance_loss="svm")
    assert model.loss(model(bags(1, 20, 6)), torch.tensor([1]))["instance"] > 0


def literal_nystrom(module, tokens):
    """The formula, with every map written out, for one bag."""
    query, key, value = module.project(tokens)
    query = query * query.shape[-1] ** -0.5
    near_query, near_key = module.means(query), module.means(key)
    first, middle, last = (
        (a @ b.transpose(-1, -2)).softmax(-1) for a, b in ((query, near_key), (near_query, near_key), (near_query, key))
    )
    z = middle.transpose(-1, -2) / (middle.sum(-2).max() * middle.sum(-1).max())
    eye = torch.eye(module.landmarks, dtype=z.dtype)
    for _ in range(6):
        p = middle @ z
        z = 0.25 * z @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p)))
    out = first @ z @ (last @ value) + module.res_conv(value)
    return module.to_out(out.transpose(1, 2).flatten(2)[:, -tokens.shape[1] :]), first @ z @ last


@pytest.mark.parametrize("count", [5, 8, 21])
def test_nystrom_attention_is_its_formula(count):
    torch.manual_seed(0)
    module = NystromAttention(16, num_heads=2, landmarks=8).double().eval()
    tokens = bags(1, count, 16).double()
    expected, maps = literal_nystrom(module, tokens)
    torch.testing.assert_close(module(tokens), expected, rtol=1e-6, atol=1e-8)
    read = maps[:, :, -count, -count:].mean(1)
    torch.testing.assert_close(module.weights_of_first(tokens), read, rtol=1e-5, atol=1e-8)


def test_transmil_attention_counts_repeated_tiles():
    model = TransMIL(6, 2, 32, 2).eval()
    output = model(bags(2, 5, 6))  # 3 x 3 square: tiles 0 to 3 appear twice
    torch.testing.assert_close(output.attention.sum(1), torch.ones(2))
    assert (output.attention >= 0).all()


def test_dsmil_binary_targets():
    model = DSMIL(6, 1).eval()
    output = model(bags(2, 9, 6))
    losses = model.loss(output, torch.tensor([0, 1]))
    expected = F.binary_cross_entropy_with_logits(output.logits[:, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(losses["bag"], expected)
    torch.testing.assert_close(model.probabilities(output), output.logits.sigmoid())
    with pytest.raises(ValueError, match="critical instance"):
        model(torch.zeros(1, 0, 6))


def test_pooling_baselines():
    torch.manual_seed(0)
    x = bags(2, 9, 6)
    mean, top = MeanPooling(6, 3, 8).eval(), MaxPooling(6, 3, 8).eval()
    torch.testing.assert_close(mean(x).logits, mean.head(x).mean(1))
    torch.testing.assert_close(top(x).logits, top.head(x).amax(1))
    torch.testing.assert_close(mean(x).attention, torch.full((2, 9), 1 / 9))
