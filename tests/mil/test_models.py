"""What holds for every MIL model: results of a bag depend on that bag alone, whatever stands beside it in the batch."""

import pytest
import torch

from saccade.errors import ConfigError, ShapeError
from saccade.mil import create_model, models

WIDTH, CLASSES = 12, 3
ALL = models()


def build(name, **options):
    torch.manual_seed(0)
    sizes = {} if name == "dsmil" else {"size": (16, 8)} if name.startswith("clam") else {"hidden_dim": 16}
    return create_model(name, feature_dim=WIDTH, num_classes=CLASSES, **sizes, **options).eval()


def unequal_bags(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(sizes), max(sizes), dtype=torch.bool)
    bags = 100 * torch.randn(len(sizes), max(sizes), WIDTH, generator=generator)  # padding that would be noticed
    for row, size in enumerate(sizes):
        bags[row, :size] /= 100
        mask[row, :size] = True
    return bags, mask


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single_bags(name):
    model = build(name)
    bags, mask = unequal_bags(9, 1, 30, 17)
    together = model(bags, mask)
    for row, size in enumerate(mask.sum(1).tolist()):
        alone = model(bags[row : row + 1, :size])
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.attention[row, :size], alone.attention[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.features[row], alone.features[0], rtol=1e-4, atol=1e-5)
    assert not together.attention[~mask].any()
    torch.testing.assert_close(together.attention.sum(1), torch.ones(4))


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_a_batch_are_the_mean_of_single_bags(name):
    model = build(name)
    bags, mask = unequal_bags(6, 11)
    target = torch.tensor([0, 2])

    def gradients(batch, present, labels):
        model.zero_grad()
        model.loss(model(batch, present), labels)["loss"].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together = gradients(bags, mask, target)
    single = [gradients(bags[i : i + 1, :n], None, target[i : i + 1]) for i, n in enumerate((6, 11))]
    for parameter, grad in together.items():
        mean = sum(one.get(parameter, torch.zeros_like(grad)) for one in single) / 2
        torch.testing.assert_close(grad, mean, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", [n for n in ALL if n != "transmil"])
def test_order_of_tiles_does_not_matter(name):
    model = build(name)
    bags, _ = unequal_bags(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    one, other = model(bags), model(bags[:, order])
    torch.testing.assert_close(other.logits, one.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.attention, one.attention[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n != "transmil"])
def test_empty_bag_beside_a_full_one(name):
    model = build(name)
    bags, mask = unequal_bags(5, 4)
    mask[1] = False
    output = model(bags, mask)
    assert output.logits.isfinite().all()
    assert not output.attention[1].any()
    model.loss(output, torch.tensor([0, 1]))["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(output.logits[0], model(bags[:1, :5]).logits[0], rtol=1e-4, atol=1e-5)


def test_transmil_refuses_an_empty_bag():
    bags, mask = unequal_bags(5, 4)
    mask[1] = False
    with pytest.raises(ShapeError, match="bag 1 of the batch has none"):
        build("transmil")(bags, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_autocast(name, dtype):
    model = build(name).train()
    bags, mask = unequal_bags(30, 8)
    with torch.autocast("cpu", dtype):
        output = model(bags, mask)
        loss = model.loss(output, torch.tensor([0, 1]))["loss"]
    loss.backward()
    assert output.attention.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ALL)
def test_float64_agrees(name):
    model = build(name)
    bags, mask = unequal_bags(13, 7)
    single = model(bags, mask).logits
    torch.testing.assert_close(model.double()(bags.double(), mask).logits.float(), single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name):
    model, clone = build(name), build(name)
    for parameter in clone.parameters():
        torch.nn.init.normal_(parameter)
    clone.load_state_dict(model.state_dict())
    bags, mask = unequal_bags(6)
    assert torch.equal(clone(bags, mask).logits, model(bags, mask).logits)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("transmil", "dsmil")])
def test_two_hundred_thousand_tiles(name):
    model = build(name)
    bags = torch.randn(1, 200_000, WIDTH, generator=torch.Generator().manual_seed(3))
    output = model(bags)
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0), rtol=0, atol=1e-3)


def test_messages():
    with pytest.raises(ConfigError, match="Did you mean 'abmil'"):
        create_model("abmill", feature_dim=4, num_classes=2)
    with pytest.raises(ConfigError, match="hiden_dim"):
        create_model("abmil", feature_dim=4, num_classes=2, hiden_dim=3)
    with pytest.raises(ShapeError, match=r"must be \(B, N, 12\); got \(3, 4, 5\)"):
        build("abmil")(torch.zeros(3, 4, 5))
    with pytest.raises(ShapeError, match="True for real instances"):
        build("abmil")(torch.zeros(3, 4, 12), torch.ones(3, 4))
