"""A timm user's own pipeline, unchanged, with our package imported; and timm models from elsewhere in ours."""

import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import _registry as registry
from timm.models import build_model_with_cfg, register_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy

import saccade
import saccade.vision_backbones  # what the user adds to the pipeline
from saccade.batch import BatchOptions
from saccade.errors import ConfigError
from saccade.vision_backbones import ModelSource, classify


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Two classes that any model can tell apart, in timm's folder layout."""
    root = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("validation", 8)):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 80, (40, 40, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm's data set leaves files open
def test_train_loop_of_timm(colours):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2, drop_path_rate=0.05)
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    mixup = Mixup(mixup_alpha=0.2, num_classes=2)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.02, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=6, warmup_epochs=1)
    ema, scaler = ModelEmaV3(model, decay=0.7), NativeScaler(device="cpu")
    loaders = {
        split: create_loader(
            create_dataset("", str(colours), split=split),
            batch_size=8,
            is_training=split == "train",
            num_workers=0,
            device=torch.device("cpu"),
            **config,
        )
        for split in ("train", "validation")
    }
    for epoch in range(epochs):
        model.train()
        for images, targets in loaders["train"]:
            images, soft = mixup(images, targets)
            loss = SoftTargetCrossEntropy()(model(images), soft)
            optimizer.zero_grad()
            scaler(loss, optimizer, parameters=model.parameters(), clip_grad=1.0)
            ema.update(model)
        scheduler.step(epoch + 1)
    top1 = AverageMeter()
    ema.module.eval()
    with torch.inference_mode():
        for images, targets in loaders["validation"]:
            top1.update(accuracy(ema.module(images), targets)[0].item(), len(images))
    assert top1.avg >= 90


@pytest.fixture(scope="module", autouse=True)
def outsider():
    """Register the model below for the tests of this file alone; others compare timm's own names."""
    register_model(outsider_net)
    yield
    registry._model_entrypoints.pop("outsider_net")


def outsider_net(pretrained=False, **kwargs):
    """A model that some third package registers with timm."""
    from timm.models.resnet import BasicBlock, ResNet

    sizes = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    return build_model_with_cfg(ResNet, "outsider_net", pretrained, **sizes, **kwargs)


def test_a_model_registered_elsewhere_is_as_good_as_any(colours, tmp_path):
    assert saccade.create_model("outsider_net", num_classes=3).num_classes == 3
    source = ModelSource("outsider_net", random_weights=True, img_size=32)
    summary = classify(
        colours / "validation", model=source, out=tmp_path / "p.csv", options=BatchOptions(num_workers=0)
    )
    assert summary.exit_code == 0
    assert summary.done == 16


def test_close_names_are_suggested():
    with pytest.raises(ConfigError, match="Did you mean 'outsider_net'"):
        saccade.create_model("outsidr_net")


def test_arguments_that_a_model_does_not_take_are_named():
    with pytest.raises(ConfigError, match="windows"):
        saccade.create_model("outsider_net", windows=7)
