import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from sklearn.metrics import precision_recall_fscore_support
from timm.data.mixup import Mixup
from torch.utils.data import DataLoader

from saccade.errors import CheckpointError, ConfigError
from saccade.vision_backbones.classifier import ImageClassifier
from saccade.vision_backbones.loading import load_model
from tests.helpers import randn

# What Lightning says about its own code, and about small data in the main process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]
CLASSES = 3


def samples(count=12, seed=0):
    """Return learnable samples: each class has its own mean."""
    images = randn(count, 3, 32, 32, seed=seed) * 0.5
    return [
        {
            "image": images[index] + 2.0 * (torch.arange(3) == index % CLASSES).view(3, 1, 1),
            "target": index % CLASSES,
            "id": f"{index}.png",
            "error": "",
            "reason": "",
        }
        for index in range(count)
    ]


def loader(count=12, batch_size=6, seed=0):
    return DataLoader(samples(count, seed), batch_size=batch_size)


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier(options.pop("backbone", "test_resnet"), CLASSES, **options)


def make_trainer(tmp_path, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


def fit(module, tmp_path, epochs=1, **data):
    trainer = make_trainer(tmp_path, max_epochs=epochs)
    trainer.fit(module, loader(**data), loader(seed=1))
    return trainer


def first_batch(count=6):
    return next(iter(loader(count, batch_size=count)))


def test_training_lowers_the_loss_and_logs_stable_names(tmp_path):
    module = classifier(lr=5e-3)
    before = module.loss(module.eval()(first_batch()["image"]), first_batch()["target"]).item()
    trainer = fit(module.train(), tmp_path, epochs=6)
    assert trainer.callback_metrics["val/loss"] < before
    assert set(trainer.callback_metrics) == {"train/acc", "train/loss", "val/acc", "val/f1", "val/loss"}


def test_validation_metrics_are_those_of_all_samples(tmp_path):
    module = classifier()
    trainer = fit(module, tmp_path, batch_size=5)
    batch = next(iter(loader(12, 12, seed=1)))
    with torch.inference_mode():
        logits = module.eval()(batch["image"])
    accuracy = (logits.argmax(1) == batch["target"]).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/acc"], accuracy)
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], F.cross_entropy(logits, batch["target"]))


def test_test_reports_each_class_and_draws_the_confusion_matrix(tmp_path):
    module = classifier(class_names=["cat", "dog", "owl"])
    trainer = fit(module, tmp_path, epochs=2)
    results = trainer.test(module, loader(11, 4), verbose=False)[0]
    predicted, targets = [], []
    for batch in loader(11, 4):
        predicted += module.eval()(batch["image"]).argmax(1).tolist()
        targets += batch["target"].tolist()
    expected = precision_recall_fscore_support(targets, predicted, labels=range(3), zero_division=0)
    for metric, values in zip(("precision", "recall", "f1"), expected, strict=False):
        assert [results[f"test/{metric}/{name}"] for name in ("cat", "dog", "owl")] == pytest.approx(values)
    picture = tmp_path / "confusion_matrix.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_frozen_backbone_stays_as_it_is(tmp_path):
    module = classifier(freeze=True, lr=0.1)
    before = copy.deepcopy(module.model.state_dict())
    fit(module, tmp_path, epochs=2)
    changed = {key for key, value in module.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"fc.weight", "fc.bias"}  # and no statistics of BatchNorm
    module.train()
    assert not module.model.bn1.training
    assert module.model.fc.training


def test_averaged_weights_follow_the_recursion_and_are_used(tmp_path):
    decay = 0.5
    module = classifier(ema_decay=decay, lr=0.05)
    history = []
    update = module.ema_updater[0].update
    module.ema_updater[0].update = lambda model, step: (
        history.append((step, model.fc.weight.detach().clone())),
        update(model, step=step),
    )
    expected = module.ema.fc.weight.clone()
    fit(module, tmp_path, epochs=3)
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 6]
    for step, weight in history:
        factor = module.ema_updater[0].get_decay(step)
        expected = factor * expected + (1 - factor) * weight
    assert 0 < module.ema_updater[0].get_decay(6) <= decay
    torch.testing.assert_close(module.ema.fc.weight, expected)
    images = first_batch()["image"]
    module.eval()
    torch.testing.assert_close(module(images), module.ema(images))
    assert not torch.allclose(module(images), module.model(images))


def test_averaging_does_not_change_training(tmp_path):
    plain, averaged = classifier(), classifier(ema_decay=0.9)
    fit(plain, tmp_path)
    fit(averaged, tmp_path)
    torch.testing.assert_close(averaged.model.state_dict(), plain.model.state_dict())


def test_averages_move_once_per_optimiser_step(tmp_path):
    module = classifier(ema_decay=0.9)
    trainer = make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, loader(12, 3), loader(3))
    assert module.ema.bn1.num_batches_tracked == 4
    assert module.steps_averaged == 2


@pytest.mark.parametrize("count", [6, 5])
def test_mixup_trains_on_mixed_images_and_targets(count):
    module = classifier(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1)
    module.log = lambda *args, **kwargs: None
    batch = first_batch(count)
    mixer = Mixup(1.0, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    even = count // 2 * 2
    np.random.seed(5)
    images, target = mixer(batch["image"][:even].clone(), batch["target"][:even])
    expected = F.cross_entropy(copy.deepcopy(module.model)(images), target)
    np.random.seed(5)
    loss = module.training_step(batch, 0)
    assert not torch.equal(images, first_batch(count)["image"][:even])
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_and_class_weights_enter_the_loss():
    weights = [0.2, 1.0, 3.0]
    module = classifier(label_smoothing=0.2, class_weights=weights)
    module.setup("fit")
    logits, target = randn(6, CLASSES), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = F.cross_entropy(logits, target, weight=torch.tensor(weights), label_smoothing=0.2)
    torch.testing.assert_close(module.loss(logits, target), expected)


def test_balanced_class_weights_come_from_the_data():
    class Trainer:
        class datamodule:  # noqa: N801
            class_counts = (1, 2, 3)

    module = classifier(class_weights="balanced")
    module._trainer = Trainer()
    module.setup("fit")
    torch.testing.assert_close(module.loss_weight, torch.tensor([2.0, 1.0, 2 / 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "test_resnt"}, "Unknown model 'test_resnt'. Did you mean 'test_resnet'"),
        ({"class_names": ["a"]}, "class_names has 1 names, expected num_classes = 3"),
        ({"pretrained": True, "weights": "w.pth"}, "exclude each other"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        classifier(**options)


def test_class_weights_must_match_the_classes():
    with pytest.raises(ConfigError, match="class_weights has 2 entries, expected 3"):
        classifier(class_weights=[1.0, 2.0]).setup("fit")


def test_input_size_reaches_models_that_are_built_for_one():
    vit = classifier(backbone="test_vit", img_size=64)
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, CLASSES)
    assert vit.backbone_kwargs == {"img_size": 64}
    assert classifier(img_size=64).backbone_kwargs == {}


def test_arguments_of_the_backbone_travel_with_the_checkpoint(tmp_path):
    few = {"depth": [1, 1, 1, 1], "embed_dim": [16, 32, 48, 64], "head_dim": 8}
    module = classifier(backbone="biformer_tiny", backbone_kwargs=few)
    fit(module, tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    module.eval()
    images = first_batch()["image"]
    assert [len(stage) for stage in module.model.stages] == [1, 1, 1, 1]
    torch.testing.assert_close(load_model(str(tmp_path / "x.ckpt")).model(images), module(images))
    again = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(images), module(images))
    with pytest.raises(ConfigError, match=r"cannot be built with .*'layers': 3"):
        classifier(backbone="biformer_tiny", backbone_kwargs={"layers": 3})


def test_a_checkpoint_has_the_layers_of_the_file_that_training_began_with(tmp_path):
    few = {"depth": [1, 1], "base_dims": [8, 8], "heads": [2, 4]}
    source = timm.create_model("tap_rvt_tiny", num_scales=2, mlp_type="linear", masked_blocks=1, **few)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = {"weights": str(tmp_path / "w.pth"), "ema_decay": 0.5, "backbone_kwargs": few}
    module = classifier(backbone="rvt_tiny", **options)
    fit(module, tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    module.eval()
    images = first_batch()["image"]
    assert module.model.transformers[0].blocks[0].attn.att_mask is not None
    again = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(images), module(images))
    torch.testing.assert_close(load_model(str(tmp_path / "x.ckpt")).model(images), module(images))


def test_starting_weights_keep_the_backbone_and_renew_the_head(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    module = classifier(weights=str(tmp_path / "w.pth"))
    torch.testing.assert_close(module.model.conv1.state_dict(), source.conv1.state_dict())
    assert module.model.fc.weight.shape == (CLASSES, source.num_features)
    same = timm.create_model("test_resnet", num_classes=CLASSES)
    torch.save(same.state_dict(), tmp_path / "same.pth")
    torch.testing.assert_close(classifier(weights=str(tmp_path / "same.pth")).model.fc.weight, same.fc.weight)


def test_starting_weights_of_another_model_are_refused(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="do not fit"):
        classifier(weights=str(tmp_path / "w.pth"))


def test_checkpoint_is_plain_and_enough(tmp_path):
    start = timm.create_model("test_resnet", num_classes=7)
    torch.save(start.state_dict(), tmp_path / "w.pth")
    names = ["cat", "dog", "owl"]
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    module = classifier(class_names=names, data_config=config, ema_decay=0.5, lr=0.05, weights=str(tmp_path / "w.pth"))
    fit(module, tmp_path, epochs=2).save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "w.pth").unlink()  # what training began with is not needed any more
    module.eval()
    images = first_batch()["image"]

    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert {"task": "image", "backbone": "test_resnet", "num_classes": 3}.items() <= content["saccade"].items()
    assert content["saccade"]["class_names"] == names
    assert content["saccade"]["data_config"] == config
    torch.testing.assert_close(content["state_dict"]["ema.fc.weight"], module.ema.fc.weight)
    torch.testing.assert_close(content["state_dict"]["model.fc.weight"], module.model.fc.weight)

    again = ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(images), module(images))
    assert again.class_names == names

    loaded = load_model(str(tmp_path / "x.ckpt"))
    torch.testing.assert_close(loaded.model(images), module(images))  # the averaged weights
    assert loaded.class_names == names

    child = classifier(weights=str(tmp_path / "x.ckpt"))
    torch.testing.assert_close(child.model.fc.weight, module.ema.fc.weight)


def test_predictions_carry_their_ids(tmp_path):
    module = classifier()
    outputs = make_trainer(tmp_path).predict(module, loader(5, 2))
    assert [name for output in outputs for name in output["id"]] == [f"{index}.png" for index in range(5)]
    logits = torch.cat([output["logits"] for output in outputs])
    torch.testing.assert_close(logits, module.eval()(next(iter(loader(5, 5)))["image"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_optimiser_and_schedule(tmp_path, given):
    options = {
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1),
    }
    module = classifier(**(options if given else {"lr": 0.02}))
    trainer = fit(module, tmp_path, epochs=2)
    group = trainer.optimizers[0].param_groups[0]
    if given:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0.0)
        assert group["lr"] == pytest.approx(0.003)
    else:
        assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
        assert group["initial_lr"] == 0.02
        assert group["lr"] == pytest.approx(0.0, abs=1e-9)


def test_default_schedule_needs_an_end(tmp_path):
    with pytest.raises(ConfigError, match=r"set trainer.max_epochs or trainer.max_steps"):
        make_trainer(tmp_path, max_epochs=-1).fit(classifier(), loader(), loader())
