"""ACMIL's own: masking of the best instances, diversity of branches, folded projections, recomputed gates."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from saccade.errors import ConfigError, ShapeError
from saccade.mil import ACMILGA, ACMILMHA
from saccade.mil.acmil import diversity_loss, drop_top_instances
from saccade.mil.gated_attention import GatedAttention


@pytest.mark.parametrize(
    ("count", "top", "share", "drops"), [(30, 10, 0.6, 6), (7, 10, 0.6, 4), (2, 10, 0.35, 0), (1, 5, 1, 1)]
)
def test_exact_number_of_the_best_is_masked(count, top, share, drops):
    scores = torch.randn(3, 4, count, generator=torch.Generator().manual_seed(0))
    dropped = drop_top_instances(scores, None, top, share, None, torch.Generator().manual_seed(1))
    assert (dropped.sum(-1) == drops).all()
    best = torch.zeros_like(dropped).scatter_(-1, scores.topk(min(top, count)).indices, True)
    assert not (dropped & ~best).any()


def test_masking_counts_real_instances_only():
    scores = torch.full((2, 1, 12), 5.0)
    scores[:, :, :4] = torch.arange(4.0)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :4] = mask[1] = True
    dropped = drop_top_instances(scores, mask, 10, 0.6, None, torch.Generator().manual_seed(0))
    assert dropped.sum(-1).flatten().tolist() == [2, 6]  # int(4 * 0.6) and int(10 * 0.6)
    assert not (dropped[:, 0] & ~mask).any()


def test_every_best_instance_can_be_masked():
    scores = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drop_top_instances(scores, None, 4, 0.5, None, generator)[0, 0] for _ in range(400)])
    frequency = draws.float().mean(0)[scores[0, 0].topk(4).indices]
    assert ((frequency - 0.5).abs() < 0.1).all()


def test_masking_everything_leaves_uniform_attention():
    model = ACMILGA(6, 2, 8, 4, branches=2, mask_top=10, mask_share=1.0).train()
    output = model(torch.randn(1, 5, 6))
    torch.testing.assert_close(output.attention, torch.full((1, 5), 0.2))


def test_noise_decides_and_must_fit():
    model = ACMILGA(6, 2, 8, 4, branches=2, mask_top=4, mask_share=0.5).train()
    bags, noise = torch.randn(3, 9, 6), torch.rand(3, 2, 4)
    assert torch.equal(model(bags, noise=noise).dropped, model(bags, noise=noise).dropped)
    with pytest.raises(ShapeError, match=r"noise must be \(3, 2, 4\)"):
        model(bags, noise=noise[:1])


@pytest.mark.parametrize("shape", [(2, 5, 20), (1, 3, 4, 9)])
def test_diversity_is_the_mean_cosine_of_pairs(shape):
    attention = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    pairs = itertools.combinations(attention.unbind(1), 2)
    literal = torch.stack([torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()
    torch.testing.assert_close(diversity_loss(attention), literal)
    assert diversity_loss(attention[:, :1]) == 0


def test_folded_heads_equal_projected_ones():
    torch.manual_seed(0)
    model = ACMILMHA(10, 2, 16, num_heads=4, branches=3).double().eval()
    torch.nn.init.normal_(model.q)
    bags = torch.randn(2, 7, 10, dtype=torch.float64)
    output = model(bags)
    hidden = model.dimreduction(bags)
    for m, branch in enumerate(model.sub_attention):
        split = lambda t: t.unflatten(-1, (4, 4)).transpose(-3, -2)  # noqa: E731
        query, key, value = (
            split(branch.q_proj(model.q[0, m : m + 1])),
            split(branch.k_proj(hidden)),
            split(branch.v_proj(hidden)),
        )
        weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
        torch.testing.assert_close(output.branch_attention[:, m], weights[..., 0, :])
        out = branch.layer_norm(branch.out_proj((weights @ value)[..., 0, :].flatten(1)))
        torch.testing.assert_close(output.branch_logits[:, m], model.classifier[m](out))


def test_recomputed_scores_have_the_gradients_of_the_literal_form(monkeypatch):
    monkeypatch.setattr("saccade.mil.gated_attention.CHUNK", 3)
    torch.manual_seed(0)
    attention = GatedAttention(5, 4, 2).double()
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)

    def literal(x):
        gate = attention.attention_V(x) * attention.attention_U(x)
        return attention.attention_weights(gate).transpose(1, 2)

    torch.testing.assert_close(attention(hidden), literal(hidden))
    inputs = (hidden, *attention.parameters())
    weight = torch.randn(2, 2, 7, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((f(hidden) * weight).sum(), inputs) for f in (attention, literal))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(attention, hidden)


def test_projection_and_scores_have_the_gradients_of_the_literal_form(monkeypatch):
    monkeypatch.setattr("saccade.mil.gated_attention.CHUNK", 3)
    torch.manual_seed(0)
    attention = GatedAttention(5, 4, 2).double()
    bags = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    projection = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def literal(bags, projection):
        hidden = (bags @ projection.T).relu()
        return hidden, attention(hidden)

    weights = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 2, 7, dtype=torch.float64)
    inputs = (bags, projection, *attention.parameters())
    results = []
    for function in (attention.project, literal):
        outputs = function(bags, projection)
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append((*outputs, *torch.autograd.grad(total, inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(attention.project, (bags, projection))
    with torch.no_grad():
        for got, expected in zip(attention.project(bags, projection), results[1], strict=False):
            torch.testing.assert_close(got, expected)


def test_loss_of_one_branch_is_the_bag_loss():
    model = ACMILGA(6, 2, 8, 4, branches=1, mask_top=0).train()
    output = model(torch.randn(4, 9, 6))
    losses = model.loss(output, torch.tensor([0, 1, 1, 0]))
    assert losses["loss"] == losses["bag"] == F.cross_entropy(output.logits, torch.tensor([0, 1, 1, 0]))


def test_compiles():
    model = ACMILGA(6, 2, 8, 4).eval()
    bags = torch.randn(2, 9, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(bags).logits, model(bags).logits)


def test_messages():
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        ACMILMHA(6, 2, 10)
    with pytest.raises(ConfigError, match="mask_share <= 1"):
        ACMILGA(6, 2, mask_share=1.5)
