"""RobustClassifier: its loss is the sum of its parts, its checkpoints are read by everything that reads any."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from saccade.errors import CheckpointError, ConfigError, ShapeError
from saccade.vision_backbones import RobustClassifier, load_model
from saccade.vision_backbones.patch_augmentation import patch_wise_augmentation
from saccade.vision_backbones.token_pooling import TokenAveragePooling
from tests.helpers import assert_close, randn, run_cli

# What Lightning says about its own code, and about small data in the main process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}


def classifier(**options):
    torch.manual_seed(0)
    backbone = {"backbone_kwargs": SMALL, "img_size": 64} | options
    module = RobustClassifier(backbone.pop("backbone", "vit_small_patch16_224"), 3, **backbone)
    for key, parameter in module.model.named_parameters():
        if "qkv.weight" in key:
            parameter.data.mul_(20)  # far from uniform attention
    return module


def loader():
    images = randn(12, 3, 64, 64)
    samples = [
        {"image": images[i] + i % 3, "target": i % 3, "id": str(i), "error": "", "reason": ""} for i in range(12)
    ]
    return DataLoader(samples, batch_size=6)


def fit(module, tmp_path, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **{"max_epochs": 1, **quiet, **options})
    trainer.fit(module, loader(), loader())
    return trainer


def test_the_loss_is_cross_entropy_and_weighted_diversity(tmp_path):
    module = classifier(diversity_weight=0.5, lr=0.0)
    logged = fit(module, tmp_path).callback_metrics
    diversity, entropies, losses = module.diversity, [], []
    for batch in loader():
        with torch.no_grad(), diversity:
            logits = module.train().model(batch["image"])
        entropies.append(F.cross_entropy(logits, batch["target"]))
        losses.append(diversity.loss())
    assert_close(logged["train/ce"], torch.stack(entropies).mean())
    assert_close(logged["train/adl"], torch.stack(losses).mean())
    assert logged["train/adl"] > 0.1
    assert_close(logged["train/loss"], logged["train/ce"] + 0.5 * logged["train/adl"])


def test_diversity_falls_when_it_counts(tmp_path):
    def diversity_after(weight):
        module = classifier(diversity_weight=weight, lr=1e-3)
        fit(module, tmp_path, max_epochs=4)
        if module.diversity is None:
            return None
        with torch.no_grad(), module.diversity:
            module.model(next(iter(loader()))["image"])
        return module.diversity.loss()

    assert diversity_after(5.0) < 0.8 * diversity_after(1e-6)
    assert diversity_after(0.0) is None


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.5}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_soft_targets_mixed_precision_and_accumulation(tmp_path, options):
    mixed = {"mixup_alpha": options.pop("mixup_alpha", 0.0)}
    module = classifier(ema_decay=0.9, token_pooling_scales=4, **mixed)
    module.model.set_grad_checkpointing()
    logged = fit(module, tmp_path, **options).callback_metrics
    assert 0.1 < logged["train/adl"] <= 1
    assert torch.isfinite(logged["val/loss"])


def test_every_other_batch_and_some_layers(tmp_path):
    module = classifier(diversity_every=2, diversity_layers=[1])
    logged = fit(module, tmp_path, limit_train_batches=2).callback_metrics
    assert "train/adl" in logged
    assert list(module.diversity.values) == ["blocks.1.attn"]
    assert not module.diversity.enabled, "the second batch had none"


def test_patch_augmentation_adds_a_second_cross_entropy(tmp_path):
    logged = fit(classifier(patch_augmentation=True, lr=0.0), tmp_path).callback_metrics
    assert_close(logged["train/ce_patches"], logged["train/ce"], atol=0.2)
    assert logged["train/ce_patches"] != logged["train/ce"]
    assert_close(logged["train/loss"], logged["train/ce"] + logged["train/ce_patches"] + logged["train/adl"])


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("vit_small_patch16_224", {"token_pooling_scales": 3}),
        ("tap_fan_tiny_12_p16_224", {"backbone_kwargs": {"embed_dim": 32, "depth": 2}}),
        ("tap_rvt_tiny", {"backbone_kwargs": {"base_dims": [8], "depth": [2], "heads": [2]}}),
    ],
)
def test_checkpoints_hold_all_that_inference_needs(tmp_path, backbone, options):
    module = classifier(backbone=backbone, token_pooling_norm="frozen", **options)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_model(str(tmp_path / "model.ckpt"))
    images = randn(2, 3, 64, 64)
    with torch.no_grad():
        want = module.eval()(images)
        assert_close(loaded.model(images), want)
        again = RobustClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
        assert_close(again.eval()(images), want)
    layers = [module for module in again.train().model.modules() if isinstance(module, TokenAveragePooling)]
    assert len(layers) == 2
    assert not any(layer.proj[1].training for layer in layers)


def test_pooling_starts_fresh_on_the_weights_of_a_plain_model(tmp_path):
    plain = RobustClassifier("vit_small_patch16_224", 3, backbone_kwargs=SMALL, img_size=64)
    torch.save(plain.model.state_dict(), tmp_path / "plain.pth")
    options = {"backbone_kwargs": SMALL, "img_size": 64, "token_pooling_scales": 4}
    pooled = RobustClassifier("vit_small_patch16_224", 3, weights=str(tmp_path / "plain.pth"), **options)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(pooled.model.state_dict()[key], value)
    torch.save(pooled.model.state_dict(), tmp_path / "pooled.pth")
    again = RobustClassifier("vit_small_patch16_224", 3, weights=str(tmp_path / "pooled.pth"), **options)
    for key, value in pooled.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="dilation_predictor"):
        classifier(weights=str(tmp_path / "pooled.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diversity_weight": -1.0}, "must not be negative"),
        ({"diversity_every": 0}, "at least 1"),
        ({"token_pooling_norm": "frozen"}, "no token-aware average pooling"),
        ({"diversity_layers": [5]}, "2 layers"),
        ({"backbone": "test_resnet", "backbone_kwargs": None, "img_size": None}, "no attention over places"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        classifier(**options)


def test_patches_change_one_by_one():
    images = randn(8, 3, 64, 96)
    low, high = torch.full((3,), -2.0), torch.tensor([1.5, 2.0, 2.5])
    got = patch_wise_augmentation(images, low, high, generator=torch.Generator().manual_seed(0))
    clamped = images.clamp(low.view(1, 3, 1, 1), high.view(1, 3, 1, 1))
    changed = (got != clamped).any(1).unflatten(1, (4, 16)).unflatten(3, (6, 16)).any(4).any(2)
    share = changed.float().mean()
    assert 0.18 < share < 0.36, "1 - 0.9^3 of 192 patches"
    assert (got.amax((0, 2, 3)) <= high).all()
    assert (got.amin((0, 2, 3)) >= low).all()
    same = patch_wise_augmentation(images, low, high, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same, got)
    flat = torch.full((4, 3, 32, 32), 0.25)
    assert_close(patch_wise_augmentation(flat, low, high), flat, atol=0.06)  # noise alone shows on a plain picture
    with pytest.raises(ShapeError, match="multiples of 16"):
        patch_wise_augmentation(randn(1, 3, 20, 32), low, high)


def test_patches_are_zoomed_about_a_place_inside():
    ramp = torch.linspace(0, 1, 16).expand(4000, 1, 16, 16)  # brighter to the right
    got = patch_wise_augmentation(ramp, torch.zeros(1), torch.ones(1), generator=torch.Generator().manual_seed(1))
    slope = (got[:, 0, :, 8:].mean((1, 2)) - got[:, 0, :, :8].mean((1, 2))) / (8 / 15)
    assert slope.abs().max() < 1.03
    zoomed = (slope > 0.9) & (slope < 0.985)
    assert 0.04 < zoomed.float().mean() < 0.12, "side sqrt(0.85) to 1 for a tenth of the patches"
    assert 0.07 < (slope < 0).float().mean() < 0.13, "a tenth is flipped"


@pytest.mark.slow
def test_fit_and_classify_on_the_command_line(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        """
        model:
          class_path: RobustClassifier
          init_args:
            backbone: vit_small_patch16_224
            backbone_kwargs: {embed_dim: 32, depth: 2, num_heads: 2}
            token_pooling_scales: 4
            diversity_weight: 0.5
        data:
          class_path: DigitsData
          init_args: {img_size: 32, batch_size: 64}
        trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1}
        """
    )
    done = run_cli("fit", "-c", config, "--trainer.accelerator", "cpu", "--model.diversity_every", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train/adl" in next(tmp_path.glob("runs/*/*/metrics.json")).read_text()
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    Image.new("RGB", (40, 40), (90, 20, 10)).save(tmp_path / "one.png")
    done = run_cli("classify", tmp_path / "one.png", "-m", checkpoint, "-o", tmp_path / "out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "one.png" in (tmp_path / "out.csv").read_text()
