import pytest

from saccade.datasets.corruptions import CORRUPTIONS, GROUPS
from saccade.datasets.robustness_suites import (
    PERTURBATIONS,
    SUITES,
    choose_corruptions,
    find_suite,
    imagenet_classes,
)
from saccade.errors import ConfigError
from tests.suite_trees import WNIDS


@pytest.fixture(scope="module")
def whole():
    return imagenet_classes()


def touch(folder, names, count=1, suffix=".JPEG"):
    """Write empty files; the readers of layouts never open one."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}{suffix}").touch()
    return folder


def corruption_folders(root, names=WNIDS, count=2, kinds=tuple(CORRUPTIONS)):
    for kind in kinds:
        for severity in "12345":
            touch(root / kind / severity, names, count)
    return root


def test_imagenet_classes_are_a_thousand_sorted_ids(whole):
    assert len(whole) == 1000
    assert whole == sorted(whole)
    assert (whole[0], whole[999]) == ("n01440764", "n15075141")


def test_choose_corruptions():
    assert choose_corruptions(None) == list(CORRUPTIONS)
    assert choose_corruptions(["snow", "noise"]) == [*GROUPS["noise"], "snow"]
    with pytest.raises(ConfigError, match=r"'wether'\. Did you mean 'weather'"):
        choose_corruptions(["wether"])


@pytest.mark.parametrize(("name", "count"), [("imagenet-a", 200), ("imagenet-r", 200), ("imagenet-sketch", 1000)])
def test_columns_of_the_subsets(tmp_path, whole, name, count):
    from importlib.resources import files

    listing = files("timm") / "data" / "_info" / f"{name.replace('-', '_')}_indices.txt"
    expected = list(map(int, listing.read_text().split())) if count == 200 else list(range(1000))
    touch(tmp_path, [whole[index] for index in expected])
    suite = find_suite(name, [tmp_path], classes=whole)
    assert list(suite.columns) == expected
    (part,) = suite.parts
    files_found = suite.files(part)
    assert suite.has_all_of_imagenet == (count == 1000)
    assert len(files_found) == suite.size(part) == count
    assert all(whole[suite.columns[label]] == path.parent.name for path, label in files_found)


def test_v2_folders_are_numbers_not_in_the_order_of_their_names(tmp_path, whole):
    touch(tmp_path, map(str, range(1000)))
    suite = find_suite("imagenet-v2", [tmp_path], classes=whole)
    labels = {path.parent.name: suite.columns[label] for path, label in suite.files(suite.parts[0])}
    assert labels == {str(index): index for index in range(1000)}


def test_a_model_of_some_classes_in_its_own_order(tmp_path, whole):
    touch(tmp_path, whole[:30])
    classes = ["n01514668", "n01440764", "n01443537"]
    suite = find_suite("imagenet-sketch", [tmp_path], classes=classes)
    labels = {path.parent.name: suite.columns[label] for path, label in suite.files(suite.parts[0])}
    assert labels == {"n01514668": 0, "n01440764": 1, "n01443537": 2}
    assert not suite.has_all_of_imagenet
    assert len(suite.left_out) == 27


def test_imagenet_c_in_several_roots_and_in_group_folders(tmp_path):
    corruption_folders(tmp_path / "a" / "noise", kinds=GROUPS["noise"])
    corruption_folders(tmp_path / "b", kinds=[*GROUPS["blur"], *GROUPS["weather"], *GROUPS["digital"]])
    touch(tmp_path / "val", WNIDS, 3)
    suite = find_suite("imagenet-c", [tmp_path / "a", tmp_path / "b"], classes=WNIDS, clean=tmp_path / "val")
    assert len(suite.parts) == 1 + 75
    assert suite.parts[0].id == "clean"
    assert [suite.size(part) for part in suite.parts] == [3 * len(WNIDS)] + [2 * len(WNIDS)] * 75
    assert suite.parts[1].as_they_are
    assert not suite.parts[0].as_they_are


def test_extra_corruptions_are_taken_if_there_and_needed_if_named(tmp_path):
    corruption_folders(tmp_path, kinds=[*CORRUPTIONS][:17], count=1)
    suite = find_suite("imagenet-c", [tmp_path], classes=WNIDS)
    assert len({part.kind for part in suite.parts}) == 17
    with pytest.raises(ConfigError, match=r"10 folders .* spatter/1, spatter/2"):
        find_suite("imagenet-c", [tmp_path], classes=WNIDS, corruptions=["extra"])


def test_missing_folders_are_named(tmp_path):
    corruption_folders(tmp_path, kinds=["fog", "snow"])
    with pytest.raises(ConfigError, match=r"65 folders are missing .*gaussian_noise/1"):
        find_suite("imagenet-c", [tmp_path], classes=WNIDS)
    suite = find_suite("imagenet-c", [tmp_path], classes=WNIDS, corruptions=["fog"], severities=[2, 4])
    assert [part.id for part in suite.parts] == ["fog/2", "fog/4"]


def test_missing_class_empty_class_and_short_class_are_named(tmp_path):
    corruption_folders(tmp_path, kinds=["fog"])
    (tmp_path / "fog/3" / WNIDS[1] / "0.JPEG").unlink()
    with pytest.raises(ConfigError, match=rf"fog/3/{WNIDS[1]} \(1 of 2 files\)"):
        find_suite("imagenet-c", [tmp_path], classes=WNIDS, corruptions=["fog"])
    (tmp_path / "fog/3" / WNIDS[1] / "1.JPEG").unlink()
    with pytest.raises(ConfigError, match=rf"1 folders .*fog/3/{WNIDS[1]}\."):
        find_suite("imagenet-c", [tmp_path], classes=WNIDS, corruptions=["fog"])
    (tmp_path / "fog/3" / WNIDS[1]).rmdir()
    with pytest.raises(ConfigError, match=rf"fog/3/{WNIDS[1]}\..*nothing was shifted"):
        find_suite("imagenet-c", [tmp_path], classes=WNIDS, corruptions=["fog"])


def test_long_lists_of_missing_folders_are_cut(tmp_path, whole):
    touch(tmp_path, whole[:100])
    with pytest.raises(ConfigError, match=r"900 folders .* and 888 more"):
        find_suite("imagenet-sketch", [tmp_path], classes=whole)


def test_imagenet_p(tmp_path):
    for kind in PERTURBATIONS:
        touch(tmp_path / kind, WNIDS, 2, ".mp4")
    suite = find_suite("imagenet-p", [tmp_path], classes=WNIDS)
    assert [part.id for part in suite.parts] == list(PERTURBATIONS)
    assert {suite.size(part) for part in suite.parts} == {2 * len(WNIDS)}
    with pytest.raises(ConfigError, match="gaussian_noise_2, shot_noise_2"):
        find_suite("imagenet-p", [tmp_path], classes=WNIDS, difficulty=2)
    with pytest.raises(ConfigError, match="difficulty must be 1, 2 or 3"):
        find_suite("imagenet-p", [tmp_path], classes=WNIDS, difficulty=4)


def test_a_folder_of_ones_own_to_corrupt(tmp_path):
    touch(tmp_path, ["daisy", "rose"], 3, ".png")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "daisy" / "notes.txt").touch()
    suite = find_suite("corruptions", [tmp_path], classes=["rose", "tulip", "daisy"])
    assert len(suite.parts) == 1 + 95
    assert suite.columns == (0, 1, 2), "an absent class competes all the same"
    labels = {path.parent.name: suite.columns[label] for path, label in suite.files(suite.parts[7])}
    assert labels == {"rose": 0, "daisy": 2}
    with pytest.raises(ConfigError, match="Not among the model's classes: daisy"):
        find_suite("corruptions", [tmp_path], classes=["rose", "tulip"])


def test_files_deeper_in_a_class_folder_count(tmp_path):
    touch(tmp_path / "rose", ["garden", "wild"], 2)
    touch(tmp_path, ["tulip", "rose/.cache"], 1)
    (tmp_path / "rose/wild/round").symlink_to(tmp_path / "rose")
    suite = find_suite("corruptions", [tmp_path], classes=["rose", "tulip"])
    names = [path.relative_to(tmp_path).as_posix() for path, _ in suite.files(suite.parts[0])]
    assert names == [*(f"rose/{place}/{i}.JPEG" for place in ("garden", "wild") for i in (0, 1)), "tulip/0.JPEG"]


def test_the_folder_above_the_splits_is_not_the_one_meant(tmp_path):
    touch(tmp_path, ["train", "test"])
    with pytest.raises(ConfigError, match=rf"classes: test, train\. Did you mean {tmp_path}/test\?"):
        find_suite("corruptions", [tmp_path], classes=["rose", "tulip"])


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        find_suite("imagenet-a", [tmp_path / "nowhere"], classes=WNIDS)
    with pytest.raises(ConfigError, match="imagenet-r takes one folder, got 2"):
        find_suite("imagenet-r", [tmp_path, tmp_path], classes=WNIDS)
    with pytest.raises(ConfigError, match=r"shares no class with imagenet-a.*rose, tulip"):
        find_suite("imagenet-a", [tmp_path], classes=["rose", "tulip"])


def test_the_command_offers_every_suite():
    from saccade.apps import robustness

    assert robustness.SUITES == SUITES
