"""Trained aggregators load by their keys alone, and nothing else does."""

import pickle

import pytest
import torch

from saccade.errors import CheckpointError, ConfigError
from saccade.mil import ABMIL, ACMILGA, ACMILMHA, CLAMMB, CLAMSB, DSMIL, MeanPooling, TransMIL, load_model

MODELS = [
    ABMIL(12, 3, 16, 8),
    ABMIL(12, 3, 16, 8, gated=False, projection_bias=True),
    ACMILGA(12, 3, 16, 8, branches=4),
    ACMILMHA(12, 3, 16, branches=2),
    CLAMSB(12, 3, (16, 8)),
    CLAMSB(12, 3, (16, 8), gated=False),
    CLAMMB(12, 3, (16, 8), gated=False, dropout=0.0),
    TransMIL(12, 3, 32),
    DSMIL(12, 3),
    DSMIL(12, 1, nonlinear=False, project_values=True),
    MeanPooling(12, 3, 16),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_architecture_follows_from_the_weights(tmp_path, model):
    path = tmp_path / "checkpoint-best.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)  # as ACMIL's save_model writes it
    bags = torch.randn(2, 9, 12)
    loaded = load_model(path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(bags).logits, model.eval()(bags).logits)


def millab_state():
    shapes = {
        "patch_embed.0.weight": (16, 12),
        "patch_embed.0.bias": (16,),
        "global_attn.attention_a.0.weight": (8, 16),
        "global_attn.attention_a.0.bias": (8,),
        "global_attn.attention_b.0.weight": (8, 16),
        "global_attn.attention_b.0.bias": (8,),
        "global_attn.attention_c.weight": (1, 8),
        "global_attn.attention_c.bias": (1,),
    }
    return {f"model.{key}": torch.randn(shape) for key, shape in shapes.items()}


def test_millab_weights(tmp_path):
    state = millab_state() | {"model.classifier.weight": torch.randn(2, 16), "model.classifier.bias": torch.randn(2)}
    torch.save(state, tmp_path / "abmil.pt")
    model = load_model(tmp_path / "abmil.pt")
    bags = torch.randn(1, 7, 12)
    s = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    hidden = (bags @ s["patch_embed.0.weight"].T + s["patch_embed.0.bias"]).relu()
    a = (hidden @ s["global_attn.attention_a.0.weight"].T + s["global_attn.attention_a.0.bias"]).tanh()
    b = (hidden @ s["global_attn.attention_b.0.weight"].T + s["global_attn.attention_b.0.bias"]).sigmoid()
    scores = (a * b) @ s["global_attn.attention_c.weight"].T
    pooled = (scores.softmax(1) * hidden).sum(1)
    torch.testing.assert_close(model(bags).logits, pooled @ s["classifier.weight"].T + s["classifier.bias"])


def test_weights_without_classifier(tmp_path):
    torch.save(millab_state(), tmp_path / "feather.pt")
    with pytest.raises(CheckpointError, match="without a classifier: say num_classes"):
        load_model(tmp_path / "feather.pt")
    assert load_model(tmp_path / "feather.pt", num_classes=4)(torch.randn(1, 3, 12)).logits.shape == (1, 4)


def test_what_is_no_mil_model(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no MIL model that saccade knows"):
        load_model(tmp_path / "other.pth")
    torch.save({"attention_net.0.weight": torch.zeros(3, 4)}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"lacks 'attention_net\.3\.module\.0\.weight'"):
        load_model(tmp_path / "part.pth")
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "absent.pth")


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a data file ran')",))


def test_code_in_a_file_is_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "evil.pth")
