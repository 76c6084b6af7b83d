import csv
import json
import shutil
import zlib
from importlib.resources import files

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from saccade.batch import BatchOptions
from saccade.datasets.corruptions import CORRUPTIONS, GROUPS, corrupt
from saccade.datasets.robustness_suites import PERTURBATIONS, imagenet_classes
from saccade.errors import ConfigError, DataError
from saccade.vision_backbones import ModelSource, classify, evaluate_robustness, load_model
from saccade.vision_backbones.robustness_metrics import COUNTED
from tests.suite_trees import (
    DATA_CONFIG,
    WNIDS,
    picture,
    write_checkpoint,
    write_classes,
    write_clip,
    write_imagenet_c,
)

HERE = BatchOptions(num_workers=0, batch_size=16)
THOUSAND = ModelSource("test_resnet", random_weights=True, img_size=32)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("suites")
    write_checkpoint(root / "model.ckpt")
    write_classes(root / "val")
    write_imagenet_c(root / "c")
    return root


def rows(out):
    """Return the rows of the table of parts by id."""
    with (out / "parts.csv").open() as stream:
        return {row["path"]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def network(trees):
    """The model of the checkpoint."""
    return load_model(str(trees / "model.ckpt")).model


def logits_of(images, network):
    """Return what a model makes of uint8 images ``(N, Y, X, 3)``."""
    with torch.inference_mode():
        return network((torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)


def test_imagenet_c_from_the_files_as_they_are(trees, network, tmp_path):
    got = evaluate_robustness(
        trees / "c",
        model=str(trees / "model.ckpt"),
        out=tmp_path,
        suite="imagenet-c",
        clean=trees / "val",
        options=HERE,
    )
    assert (got.total, got.done, got.exit_code) == (96, 96, 0)
    assert got.metrics["clean_top1_percent"] == 100
    table = rows(tmp_path)
    correct = {kind: 0 for kind in CORRUPTIONS}
    for kind in CORRUPTIONS:
        for severity in range(1, 6):
            images = [np.asarray(Image.open(trees / "c" / kind / str(severity) / wnid / "0.png")) for wnid in WNIDS]
            right = int((logits_of(images, network).argmax(1) == torch.arange(len(WNIDS))).sum())
            assert int(table[f"{kind}/{severity}"]["correct"]) == right, (kind, severity)
            correct[kind] += right
    mean = 100 * sum(correct[kind] for kind in COUNTED) / (75 * len(WNIDS))
    assert 20 < mean < 95, "labels that were shifted would show"
    assert got.metrics["mean_corruption_accuracy_15_percent"] == pytest.approx(mean)
    assert got.metrics["retention_percent"] == pytest.approx(mean)
    for group, names in GROUPS.items():
        expected = 100 * sum(correct[name] for name in names) / (5 * len(names) * len(WNIDS))
        assert got.metrics[f"{group}_top1_percent"] == pytest.approx(expected)
    assert "mCE_percent" not in got.metrics, "AlexNet's errors are those of a thousand classes"
    assert json.loads((tmp_path / "metrics.json").read_text())["all_of_imagenet"] is False


def test_corruptions_on_the_fly_are_those_of_corrupt_behind_the_usual_crop(trees, network, tmp_path):
    got = evaluate_robustness(
        trees / "val",
        model=str(trees / "model.ckpt"),
        out=tmp_path,
        suite="corruptions",
        corruptions=["gaussian_noise", "fog"],
        severities=[5],
        options=BatchOptions(num_workers=0, seed=3),
    )
    assert got.total == 3
    assert set(got.metrics) == {"clean_top1_percent", "mean_top1_of_2_folders_percent"}
    transform = timm.data.create_transform(**DATA_CONFIG, use_prefetcher=True)
    for kind in ("gaussian_noise", "fog"):
        images = []
        for label, wnid in enumerate(WNIDS):
            for index in range(2):
                state = (3, zlib.crc32(f"{wnid}/{index}.png".encode()), list(CORRUPTIONS).index(kind), 5)
                clean = np.asarray(transform(Image.fromarray(picture(label, index)))).transpose(1, 2, 0)
                images.append(corrupt(np.ascontiguousarray(clean), kind, 5, np.random.default_rng(state)))
        right = logits_of(images, network).argmax(1) == torch.arange(len(WNIDS)).repeat_interleave(2)
        assert int(rows(tmp_path)[f"{kind}/5"]["correct"]) == int(right.sum())
    assert "not comparable" in (tmp_path / "table.md").read_text()


def test_neither_processes_nor_batches_nor_shards_change_a_figure(trees, tmp_path):
    arguments = {
        "model": str(trees / "model.ckpt"),
        "suite": "corruptions",
        "corruptions": ["noise"],
        "severities": [4],
    }
    one = evaluate_robustness(trees / "val", out=tmp_path / "1", options=HERE, **arguments)
    other = BatchOptions(num_workers=2, batch_size=5)
    two = evaluate_robustness(trees / "val", out=tmp_path / "2", options=other, **arguments)
    assert one.metrics == two.metrics
    for shard in ("1/2", "2/2"):
        options = BatchOptions(num_workers=0, shard=shard)
        got = evaluate_robustness(trees / "val", out=tmp_path / "3", options=options, **arguments)
        assert (got.total, got.metrics) == (2, {})
    assert not (tmp_path / "3" / "metrics.json").exists()


def test_four_of_imagenet_a_and_r_are_judged_among_the_two_hundred(tmp_path):
    indices = list(map(int, (files("timm") / "data/_info/imagenet_r_indices.txt").read_text().split()))
    wnids = imagenet_classes()
    write_classes(tmp_path / "r", [wnids[index] for index in indices], 1)
    got = evaluate_robustness(tmp_path / "r", model=THOUSAND, out=tmp_path / "o", suite="imagenet-r", options=HERE)
    classify(tmp_path / "r", model=THOUSAND, out=tmp_path / "p.csv", logits=tmp_path / "l.h5", options=HERE)
    with h5py.File(tmp_path / "l.h5") as stored:
        paths = [path.decode().partition("/")[0] for path in stored["paths"][:]]
        among = stored["logits"][:][:, indices].argsort(axis=1)[:, ::-1]
    labels = np.array([[indices.index(wnids.index(wnid))] for wnid in paths])
    assert got.metrics["imagenet_r_top1_percent"] == pytest.approx(100 * (among[:, :1] == labels).mean())
    assert got.metrics["imagenet_r_top5_percent"] == pytest.approx(100 * (among[:, :5] == labels).any(1).mean())
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["classes"] == 200


def still_and_flipping(label, frames):
    """Return frames of one class, and frames that change to the next class and back."""
    other = (label + 1) % len(WNIDS)
    return (
        [picture(label, 0, 64)] * frames,
        [picture(label if index % 2 == 0 else other, 0, 64) for index in range(frames)],
    )


def test_imagenet_p_flips(trees, tmp_path):
    for kind in PERTURBATIONS:
        for label, wnid in enumerate(WNIDS):
            still, flipping = still_and_flipping(label, 6)
            write_clip(tmp_path / "p" / kind / wnid / "still.mp4", still)
            write_clip(tmp_path / "p" / kind / wnid / "flipping.mp4", flipping)
    arguments = {"model": str(trees / "model.ckpt"), "suite": "imagenet-p"}
    got = evaluate_robustness(tmp_path / "p", out=tmp_path / "o", options=HERE, **arguments)
    table = rows(tmp_path / "o")
    assert float(table["tilt"]["flip_probability"]) == pytest.approx(0.5, abs=0.03)  # each frame, or none
    assert float(table["shot_noise"]["flip_probability"]) == pytest.approx(
        0.3, abs=0.03
    )  # 3 of 5 differ from the first
    assert got.metrics["mean_flip_probability_percent"] == pytest.approx(46, abs=3)
    assert float(table["tilt"]["top5_distance"]) > 0
    assert "mFR_percent" not in got.metrics
    table_of_itself = tmp_path / "o" / "parts.csv"
    again = evaluate_robustness(
        tmp_path / "p", out=tmp_path / "o", reference=table_of_itself, options=HERE, **arguments
    )
    assert again.resumed == 10
    assert again.metrics["mFR_percent"] == pytest.approx(100)
    assert again.metrics["mT5D_percent"] == pytest.approx(100)
    reference = tmp_path / "alexnet.csv"
    reference.write_text("kind,flip_probability,top5_distance\nsnow,0.1,\n")
    with pytest.raises(ConfigError, match=r"alexnet\.csv needs the columns .* gaussian_noise is wrong or missing"):
        evaluate_robustness(tmp_path / "p", out=tmp_path / "o", reference=reference, options=HERE, **arguments)


def test_a_broken_clip_is_named_and_counts_nowhere(trees, tmp_path):
    for kind in PERTURBATIONS:
        for label, wnid in enumerate(WNIDS):
            write_clip(tmp_path / "p" / kind / wnid / "0.mp4", still_and_flipping(label, 2)[1])
    (tmp_path / "p/tilt" / WNIDS[0] / "0.mp4").write_bytes(b"no film")
    got = evaluate_robustness(
        tmp_path / "p", model=str(trees / "model.ckpt"), out=tmp_path / "o", suite="imagenet-p", options=HERE
    )
    assert (got.exit_code, got.bad_files) == (3, 1)
    row = rows(tmp_path / "o")["tilt"]
    assert (row["files"], row["bad_files"]) == ("5", "1")
    assert row["unreadable"] == f"{WNIDS[0]}/0.mp4: 0 frames can be decoded, 2 are needed"


def test_broken_images_are_counted_and_shift_nothing(trees, tmp_path):
    shutil.copytree(trees / "val", tmp_path / "val")
    (tmp_path / "val" / WNIDS[2] / "0.png").write_bytes(b"no picture")
    arguments = {
        "model": str(trees / "model.ckpt"),
        "suite": "corruptions",
        "corruptions": ["contrast"],
        "severities": [1],
    }
    got = evaluate_robustness(tmp_path / "val", out=tmp_path / "o", options=HERE, **arguments)
    assert (got.exit_code, got.done, got.bad_files) == (3, 2, 2)
    assert got.metrics["clean_top1_percent"] == 100, "the others keep their labels"
    row = rows(tmp_path / "o")["clean"]
    assert (row["files"], row["bad_files"], row["correct"]) == ("11", "1", "11")
    assert row["unreadable"].startswith(f"{WNIDS[2]}/0.png: ")
    assert "2 files could not be read" in (tmp_path / "o" / "table.md").read_text()
    shutil.copy(trees / "val" / WNIDS[2] / "0.png", tmp_path / "val" / WNIDS[2] / "0.png")
    mended = evaluate_robustness(tmp_path / "val", out=tmp_path / "o", options=HERE, **arguments)
    assert (mended.exit_code, mended.resumed, mended.bad_files) == (0, 0, 0)
    assert rows(tmp_path / "o")["clean"]["files"] == "12"


def test_a_folder_of_broken_images_fails_and_the_run_can_stop_at_the_first(trees, tmp_path):
    shutil.copytree(trees / "c" / "fog", tmp_path / "c" / "fog")
    for path in (tmp_path / "c/fog/2").rglob("*.png"):
        path.write_bytes(b"")
    arguments = {"model": str(trees / "model.ckpt"), "suite": "imagenet-c", "corruptions": ["fog"]}
    got = evaluate_robustness(tmp_path / "c", out=tmp_path / "o", options=HERE, **arguments)
    assert (got.exit_code, got.done, got.failed) == (3, 4, 1)
    assert list(got.metrics) == ["mean_top1_of_4_folders_percent"]
    with pytest.raises(DataError, match=r"fog/2 failed \(.*the file is empty"):
        evaluate_robustness(
            tmp_path / "c", out=tmp_path / "s", options=BatchOptions(num_workers=0, on_error="stop"), **arguments
        )


def test_a_model_of_a_thousand_classes_needs_a_thousand_folders(trees, tmp_path):
    folder = tmp_path / "c" / "fog" / "1"
    for wnid in imagenet_classes():
        (folder / wnid).mkdir(parents=True)
        (folder / wnid / "0.JPEG").symlink_to(trees / "val" / WNIDS[0] / "0.png")
    arguments = {"model": THOUSAND, "suite": "imagenet-c", "corruptions": ["fog"], "severities": [1], "options": HERE}
    got = evaluate_robustness(tmp_path / "c", out=tmp_path / "o", **arguments)
    assert got.metrics == {"mean_top1_of_1_folders_percent": pytest.approx(0.1)}  # one picture everywhere: right once
    shutil.rmtree(folder / "n02099601")
    with pytest.raises(ConfigError, match=r"1 folders .*fog/1/n02099601\."):
        evaluate_robustness(tmp_path / "c", out=tmp_path / "o2", **arguments)
    assert not (tmp_path / "o2").exists()


def test_arguments_that_cannot_be_used(trees, tmp_path):
    def run(**changes):
        arguments = {"model": str(trees / "model.ckpt"), "out": tmp_path / "o", "suite": "imagenet-a", "options": HERE}
        return evaluate_robustness(trees / "val", **{**arguments, **changes})

    for count in (0, 6):
        state = timm.create_model("test_resnet", num_classes=count).state_dict()
        torch.save(state, tmp_path / f"{count}.pth")
    for changes, message in (
        ({"suite": "imagenet-x"}, r"Unknown suite 'imagenet-x'\. Did you mean"),
        ({"clean": trees / "val"}, "beside imagenet-c only"),
        ({"reference": "a.csv"}, "for imagenet-p"),
        ({"corruptions": ["fog"]}, "no corruptions and severities to choose"),
        ({"suite": "corruptions", "severities": [0]}, r"severities must be some of 1, 2, 3, 4, 5, got \[0\]"),
        ({"model": ModelSource("test_resnet", weights=tmp_path / "0.pth")}, "has no classifier"),
        ({"model": ModelSource("test_resnet", weights=tmp_path / "6.pth")}, "Nobody knows the 6 classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(**changes)
    assert not (tmp_path / "o").exists()
