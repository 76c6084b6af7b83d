import pytest
import timm
import torch

from saccade.datasets import Augmentation, DigitsData, ImageFolderData, Preprocess
from saccade.datasets.image_data import Sample, hold_out
from saccade.errors import ConfigError
from tests.class_folders import write_folder


@pytest.fixture
def root(tmp_path):
    return str(write_folder(tmp_path, {"train": 6, "val": 3}))


def epoch(data, number=0):
    torch.manual_seed(0)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return torch.cat([batch["image"] for batch in batches]), [name for batch in batches for name in batch["id"]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # on one core
def test_training_does_not_depend_on_the_number_of_workers(root):
    augment = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    alone, names = epoch(ImageFolderData(root, img_size=16, batch_size=4, num_workers=0, augment=augment))
    shared, shared_names = epoch(ImageFolderData(root, img_size=16, batch_size=4, num_workers=2, augment=augment))
    assert shared_names == names
    torch.testing.assert_close(shared, alone, rtol=0, atol=0)


def test_every_epoch_has_its_own_order_and_transforms(root):
    data = ImageFolderData(root, img_size=16, batch_size=18, num_workers=0)
    first, names = epoch(data, 0)
    second, other_names = epoch(data, 1)
    assert names != other_names
    same = [other_names.index(name) for name in names]
    assert (first != second[same]).flatten(1).any(1).all()


def test_loading_leaves_the_global_random_numbers_alone(root):
    data = ImageFolderData(root, img_size=16, num_workers=0)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loader = data.train_dataloader()
    torch.manual_seed(3)
    _ = loader.dataset[(0, 99)]
    assert torch.rand(1) == expected


def test_evaluation_transform_is_timms(root):
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bicubic", crop_pct=0.8)
    data = ImageFolderData(root, img_size=20, num_workers=0, batch_size=2, preprocess=preprocess)
    config = data.data_config
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ([3, 20, 20], 0.8, [0.5, 0.4, 0.3])
    expected = timm.data.create_transform(**config)(data.samples("val")[1].load())
    torch.testing.assert_close(next(iter(data.val_dataloader()))["image"][1], expected)


def test_incomplete_training_batch_is_dropped_unless_it_is_the_only_one(root):
    assert len(ImageFolderData(root, batch_size=4, num_workers=0).train_dataloader()) == 4  # of 18
    assert len(ImageFolderData(root, batch_size=32, num_workers=0).train_dataloader()) == 1


def test_evaluation_keeps_the_incomplete_batch(root):
    batches = list(ImageFolderData(root, img_size=8, batch_size=4, num_workers=0).val_dataloader())
    assert [len(batch["target"]) for batch in batches] == [4, 4, 1]


def test_zero_workers_and_defaults():
    data = DigitsData(num_workers=0)
    assert data.img_size == 224
    assert data.data_config["mean"] == list(timm.data.IMAGENET_DEFAULT_MEAN)
    assert 1 <= DigitsData().num_workers <= 4


def test_batch_size_is_checked():
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        DigitsData(batch_size=0)


def test_continuing_begins_where_the_checkpoint_stood(root):
    whole, names = epoch(ImageFolderData(root, img_size=16, batch_size=4, num_workers=0), 2)
    data = ImageFolderData(root, img_size=16, batch_size=4, num_workers=0)
    data.load_state_dict({"epoch": 2, "batches": 3})
    torch.manual_seed(0)
    batch = next(iter(data.train_dataloader()))
    assert batch["id"] == names[12:16]
    torch.testing.assert_close(batch["image"], whole[12:16])


@pytest.mark.parametrize(("members", "fraction", "held"), [(10, 0.25, 2), (2, 0.01, 1), (1, 0.5, 0), (3, 1.0, 3)])
def test_hold_out_counts(members, fraction, held):
    samples = [Sample(str(index), 0, None) for index in range(members)]
    kept, out = hold_out(samples, fraction, seed=0)
    assert (len(kept), len(out)) == (members - held, held)
