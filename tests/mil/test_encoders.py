"""Published encoders from files and folders: the features are those of the library the weights were saved by."""

from dataclasses import replace

import pytest
import torch

from saccade.errors import MissingResourceError
from saccade.mil import Encoder, load_encoder
from saccade.mil.encoders import ENCODERS
from tests.tiny_clip import clip_folder


def tiles(side, count=2):
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalized(images, mean, std):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images.movedim(-1, 1) / 255 - mean) / std


def test_open_clip_from_a_folder_or_its_file(tmp_path, monkeypatch):
    """A whole CLIP is saved, text and all; what is wanted is its image tower."""
    whole = clip_folder(tmp_path / "clip")
    torch.save(whole.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save(whole.visual.state_dict(), tmp_path / "tower.bin")
    facts = replace(ENCODERS["QuiltNet"], model=f"local-dir:{tmp_path / 'clip'}", size=64)
    monkeypatch.setitem(ENCODERS, "QuiltNet", facts)
    images = tiles(64)
    with torch.inference_mode():
        expected = whole.visual(normalized(images, *facts.normalization))
    for weights in ("clip", "open_clip_pytorch_model.bin", "tower.bin"):
        torch.testing.assert_close(load_encoder("QuiltNet", weights=tmp_path / weights)(images), expected)


def test_gigapath_sees_the_middle_of_a_tile():
    """Its authors resize to 256 pixels and cut 224 out; tiles of 256 are not resized at all."""
    facts = ENCODERS["GigaPath"]
    encoder = Encoder("mean", lambda images: images.mean((2, 3)), 3, facts.size, resize=facts.resize)
    images = tiles(256)
    expected = normalized(images[:, 16:240, 16:240], *encoder.normalization).mean((2, 3))
    torch.testing.assert_close(encoder(images), expected)
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(encoder(large), expected, atol=0.02, rtol=0)
    assert encoder.settings["resize"] == 256


def test_an_open_clip_folder_without_weights_is_refused(tmp_path):
    clip_folder(tmp_path, weights=False)
    with pytest.raises(MissingResourceError, match="weights of QuiltNet cannot be had"):
        load_encoder("QuiltNet", weights=tmp_path)


def test_plip_is_a_clip_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    half = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**half, "image_size": 224, "patch_size": 56}
    text = {**half, "vocab_size": 64, "eos_token_id": 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder("PLIP", weights=tmp_path)
    images = tiles(224)
    with torch.inference_mode():
        pixels = normalized(images, *encoder.normalization)
        expected = model(input_ids=torch.ones(1, 3, dtype=torch.long), pixel_values=pixels).image_embeds
    features = encoder(images)
    assert features.shape == (2, 8)
    torch.testing.assert_close(features / features.norm(dim=1, keepdim=True), expected)
    weights = sum(p.numel() for p in encoder.function.parameters())
    assert weights == sum(p.numel() for m in (model.vision_model, model.visual_projection) for p in m.parameters())
