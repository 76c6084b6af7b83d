"""SlideClassifier through Lightning: it learns, its checkpoints predict, its tables hold what they say."""

import csv

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score, roc_auc_score
from torch.nn import functional as F

from saccade.datasets import Bag, BagData, find_bags, load_bag, save_bag
from saccade.errors import CheckpointError, ConfigError
from saccade.mil import SlideClassifier, create_model, load_classifier, models, predict_bags
from saccade.mil.evaluation import bootstrap, by_patient, classification_metrics, regression_metrics
from tests.bag_folders import write_bags

pytestmark = [  # Lightning's remarks
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*batch_size.*"),
]
SIZES = {"clam_sb": {"size": (16, 8)}, "clam_mb": {"size": (16, 8)}, "dsmil": {}}


def module_for(data, model="acmil_ga", **options):
    torch.manual_seed(0)
    sizes = SIZES.get(model, {"hidden_dim": 16})
    return SlideClassifier(
        model,
        num_classes=data.num_classes,
        class_names=data.class_names,
        data_config=data.data_config,
        options=sizes,
        lr=5e-3,
        **options,
    )


def trainer(folder, epochs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bags")
    write_bags(root)
    return root


def data(folder, **options):
    return BagData(str(folder / "bags"), str(folder / "labels.csv"), **options)


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_learns_and_predicts(folder, tmp_path):
    bags = data(folder, batch_size=4, standardize=True)
    module = module_for(bags)
    run = trainer(tmp_path, 25)
    run.fit(module, bags)
    results = run.test(module, bags, verbose=False)[0]
    assert results["test/auroc"] > 0.9
    table = read(tmp_path / "slides.csv")
    assert [row["slide"] for row in table] == sorted(slide.id for slide in bags.part("test"))
    assert float(table[0]["prob_normal"]) + float(table[0]["prob_tumour"]) == pytest.approx(1, abs=1e-5)
    assert len(read(tmp_path / "patients.csv")) == len({slide.patient for slide in bags.part("test")})
    intervals = {(row["level"], row["metric"]): row for row in read(tmp_path / "intervals.csv")}
    low, value, high = (float(intervals["slide", "acc"][name]) for name in ("low", "value", "high"))
    assert low <= value <= high
    run.save_checkpoint(tmp_path / "slides.ckpt")

    trained = load_classifier(tmp_path / "slides.ckpt")
    summary = predict_bags(folder / "bags", classifier=trained, out=tmp_path / "p.csv", attention=tmp_path / "att")
    assert (summary.done, summary.exit_code) == (24, 0)
    rows = {row["path"]: row for row in read(tmp_path / "p.csv")}
    for row in table:
        assert float(rows[row["slide"]]["prob_tumour"]) == pytest.approx(float(row["prob_tumour"]), abs=2e-6)
    bag = load_bag(find_bags(folder / "bags")["s02"])
    with h5py.File(tmp_path / "att" / "s02.h5") as file:
        assert file["attention"].shape == (len(bag), 5)
        np.testing.assert_allclose(file["attention"][:].mean(1), file["bag_attention"][:], atol=1e-6)
        assert np.array_equal(file["coords"][:], bag.coords)
        assert file.attrs["tile_size_level0"] == 256


def test_bad_bags_do_not_stop_predictions(folder, tmp_path):
    for path in (folder / "bags").iterdir():
        (tmp_path / "bags").mkdir(exist_ok=True)
        (tmp_path / "bags" / path.name).write_bytes(path.read_bytes())
    save_bag(tmp_path / "bags" / "empty.h5", Bag(np.zeros((0, 8), np.float32)))
    save_bag(tmp_path / "bags" / "other.h5", Bag(np.zeros((3, 4), np.float32)))
    (tmp_path / "bags" / "damaged.h5").write_bytes(b"no bag")
    torch.save({"model": create_model("abmil", feature_dim=8, num_classes=2).state_dict()}, tmp_path / "official.pth")
    trained = load_classifier(tmp_path / "official.pth", class_names=["a", "b"])
    summary = predict_bags(tmp_path / "bags", classifier=trained, out=tmp_path / "p.csv")
    assert (summary.done, summary.failed, summary.exit_code) == (25, 2, 3)
    rows = {row["path"]: row for row in read(tmp_path / "p.csv")}
    assert (rows["empty"]["n_tiles"], rows["empty"]["label"]) == ("0", "")
    assert "trained with another encoder" in rows["other"]["error"]
    assert rows["s00"]["label"] in ("a", "b")


@pytest.mark.parametrize("model", models())
def test_every_model_trains(folder, tmp_path, model):
    bags = data(folder, batch_size=3)
    module = module_for(bags, model, aem=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    run = trainer(tmp_path, 1)
    run.fit(module, bags)
    assert run.callback_metrics["val/loss"].isfinite()
    assert run.callback_metrics["train/aem"] <= 0
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("task", "options", "metric"),
    [("regression", {}, "pearson"), ("survival", {}, "c_index"), ("survival", {"survival": "cox"}, "c_index")],
)
def test_values_and_survival(folder, tmp_path, task, options, metric):
    bags = data(folder, task=task, label_column="value", batch_size=6)
    module = module_for(bags, "abmil", **options)
    run = trainer(tmp_path, 8)
    run.fit(module, bags)
    assert -1 <= run.validate(module, bags, verbose=False)[0][f"val/{metric}"] <= 1
    run.save_checkpoint(tmp_path / "x.ckpt")
    predict_bags(folder / "bags", classifier=load_classifier(tmp_path / "x.ckpt"), out=tmp_path / "p.csv")
    rows = read(tmp_path / "p.csv")
    values = np.array([float(row["value" if task == "regression" else "risk"]) for row in rows])
    positive = np.array([int(row["path"][1:]) % 4 >= 2 for row in rows])
    assert values[positive].mean() > values[~positive].mean()


def test_class_weights(folder):
    bags = data(folder)
    module = module_for(bags, "abmil", class_weights=[1.0, 3.0])
    module.setup("fit")
    batch = next(iter(bags.val_dataloader()))
    output = module(batch["bags"], batch["mask"])
    expected = F.cross_entropy(output.logits, batch["target"], weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(module.losses(output, batch["target"])["loss"], expected)


def test_messages(folder, tmp_path):
    bags = data(folder, task="regression", label_column="value")
    with pytest.raises(ConfigError, match="learns classes only"):
        module_for(bags, "clam_sb")
    cox = data(folder, task="survival")
    with pytest.raises(ConfigError, match="Cox's loss compares bags"):
        trainer(tmp_path, 1).fit(module_for(cox, "abmil", survival="cox"), cox)
    torch.save({"state_dict": {}, "saccade": {"task": "image"}}, tmp_path / "image.ckpt")
    with pytest.raises(CheckpointError, match="not written by a training on slides"):
        load_classifier(tmp_path / "image.ckpt")


def test_metrics():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    target = np.array([0, 1, 1, 1])
    found = classification_metrics(probabilities, target)
    assert found["acc"] == 0.75
    assert found["auroc"] == 1.0
    assert found["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert found["balanced_acc"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["kappa"] == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    many, truth = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    got = classification_metrics(many, truth)
    assert got["auroc"] == pytest.approx(roc_auc_score(truth, many, multi_class="ovr"))
    assert got["f1_macro"] == pytest.approx(f1_score(truth, many.argmax(1), average="macro"))
    assert got["kappa"] == pytest.approx(cohen_kappa_score(truth, many.argmax(1)))
    assert got["balanced_acc"] == pytest.approx(balanced_accuracy_score(truth, many.argmax(1)))
    single = classification_metrics(probabilities[:1], target[:1])
    assert np.isnan(single["auroc"])
    values = regression_metrics(np.array([1.0, 2, 3]), np.array([1.0, 2, 5]))
    assert values["mae"] == pytest.approx(2 / 3)
    mean, first, names = by_patient(probabilities, target, ["a", "b", "a", "b"])
    np.testing.assert_allclose(mean, [[0.75, 0.25], [0.25, 0.75]])
    assert (first.tolist(), names) == ([0, 1], ["a", "b"])


def test_bootstrap_covers_the_truth_and_draws_patients():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(15):
        correct = rng.random(60) < 0.7
        probabilities = np.stack([~correct, correct], 1).astype(float)
        _, low, high = bootstrap(classification_metrics, probabilities, np.ones(60, int), samples=40, seed=seed)["acc"]
        hits += low <= 0.7 <= high
    assert hits >= 11
    groups = ["a"] * 30 + ["b"] * 30
    probabilities = np.repeat([[0.0, 1.0], [1.0, 0.0]], 30, 0)
    _, low, high = bootstrap(classification_metrics, probabilities, np.ones(60, int), groups=groups, samples=60)["acc"]
    assert (low, high) == (0, 1)
