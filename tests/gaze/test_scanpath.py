"""Records of scanpaths: storage, selection, units, and what is refused."""

import json
import re

import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet, assign_objects, notices

SAMPLES = "gaze/format_samples/invalid_records_SYNTHETIC.json"


def record(**changes):
    values = {"image": "a.jpg", "x": [10, 30, 50], "y": [10, 20, 40], "duration": [0.1, 0.2, 0.3]}
    return Scanpath(**{**values, "subject": 1, "width": 800, "height": 600, **changes})


def some():
    """Four paths of different lengths; the last has no durations, the third alone has objects."""
    return ScanpathSet.from_paths(
        [
            record(),
            record(subject=2, x=[5], y=[6], duration=[0.4], task="cup"),
            record(image="b.jpg", objects=[0, -1, 1], boxes=[[0, 0, 9, 9], [9, 0, 20, 9]], target_object=1),
            record(image="b.jpg", subject="2", duration=None, split="test", meta={"age": 30}),
        ]
    )


def test_a_set_gives_back_its_records():
    paths = some()
    assert paths.lengths.tolist() == [3, 1, 3, 3]
    assert [path.subject for path in paths] == ["1", "2", "1", "2"]
    assert paths[1].task == "cup"
    assert paths[1].x.tolist() == [5]
    assert paths[3].duration is None
    assert paths[-1].meta == {"age": 30}
    assert paths[2].objects.tolist() == [0, -1, 1]
    assert paths[2].target_object == 1
    assert (paths[0].target_object, paths[0].target_box, paths[0].split) == (None, None, None)
    assert repr(paths) == "ScanpathSet(4 paths, 10 fixations, 2 images, 2 subjects)"
    assert repr(paths[1]) == "Scanpath('a.jpg', subject 2, task cup, 1 fixations)"
    with pytest.raises(IndexError):
        paths[4]


def test_selection():
    paths = some()
    assert paths.filter(image="b.jpg", subject=[1, 2]).lengths.tolist() == [3, 3]
    assert paths.filter(task=None).lengths.tolist() == [3, 3, 3]
    assert len(paths.filter(lambda path: len(path) == 1)) == 1
    assert len(paths.filter(subject="9")) == 0
    for index in (slice(1, 3), [1, 2], np.array([False, True, True, False])):
        part = paths[index]
        assert part.x.tolist() == [5, 10, 30, 50]
        assert part.objects.tolist() == [-1, 0, -1, 1]
        assert part.boxes[1] is paths.boxes[2]
    assert paths.take(np.array([3, 1, 3])).x.tolist() == [10, 30, 50, 5, 10, 30, 50]
    groups = paths.group_by("image", "task")
    assert {key: members.tolist() for key, members in groups.items()} == {
        ("a.jpg", None): [0],
        ("a.jpg", "cup"): [1],
        ("b.jpg", None): [2, 3],
    }
    assert len(paths[:2].concatenate(paths[2:])) == 4
    with pytest.raises(ConfigError, match=r"no column 'subjekt'.*Did you mean 'subject'"):
        paths.filter(subjekt=1)


def test_nothing_reaches_into_a_set():
    x = np.array([1.0, 2.0])
    paths = ScanpathSet.from_paths([record(x=x, y=[1, 2], duration=None)])
    x[0] = 99
    assert paths.x.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        paths.x[0] = 3
    with pytest.raises(ValueError, match="read-only"):
        paths[0].x[0] = 3


def test_columns_give_the_same_set_as_records():
    paths = some()
    again = ScanpathSet.from_columns(
        paths.lengths,
        paths.x,
        paths.y,
        duration=paths.duration,
        image=paths.image,
        subject=[1, 2, 1, 2],
        task=paths.task,
        width=800,
        height=600,
    )
    assert all(np.array_equal(a.x, b.x) and a.subject == b.subject for a, b in zip(paths, again, strict=True))
    assert again[3].duration is None
    assert again[0].width == 800
    with pytest.raises(DataError, match=r"y: 2 values, but lengths has 3"):
        ScanpathSet.from_columns([3], [1, 2, 3], [1, 2])
    with pytest.raises(ConfigError, match="no column 'durations'"):
        ScanpathSet.from_columns([1], [1], [2], durations=[1])


def test_degrees():
    degrees = some()[:1].to_degrees(pixels_per_degree=20)
    assert degrees[0].tolist() == [(10 - 399.5) / 20, (10 - 299.5) / 20]
    with pytest.raises(ConfigError, match="above 0"):
        some().to_degrees(0)
    with pytest.raises(DataError, match=r"record 0, width, height: unknown; this needs the image size"):
        ScanpathSet.from_paths([record(width=None)]).to_degrees(20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": []}, "y: 3 values, but x has 0"),
        ({"x": [], "y": [], "duration": []}, "record 0, x: no fixation"),
        ({"duration": [0.1]}, "duration: 1 values, but x has 3"),
        ({"x": [1, np.nan, 2]}, r"x\[1\]: nan is not a finite number of pixels"),
        ({"y": [1, 2, np.inf]}, r"y\[2\]: inf is not"),
        ({"y": [1, "?", 3]}, "y: .* is not numbers"),
        ({"duration": [0.1, -0.12, 0.1]}, r"duration\[1\]: -0.12 s is negative"),
        ({"duration": [0.1, np.nan, 0.1]}, r"duration\[1\]: nan is not a finite number of seconds"),
        ({"duration": [0.1, np.inf, 0.1]}, r"duration\[1\]: inf"),
        ({"width": 0}, "width: 0 is not a size"),
        ({"boxes": [[0, 0, 0, 9]]}, r"boxes\[0\]: \[0.0, 0.0, 0.0, 9.0\] is not x1, y1, x2, y2"),
        ({"target_box": [400, 300, 120, 90]}, "target_box: .* a width and height must be added"),
        ({"boxes": [[0, 0, 9, 9]], "target_object": 1}, "target_object: 1 is not among 1 objects"),
        ({"boxes": [[0, 0, 9, 9]], "objects": [0, 1, 0]}, r"objects\[1\]: 1 is not among the boxes"),
        ({"objects": [0, -2, 0]}, r"objects\[1\]: -2"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(DataError, match=message):
        record(**changes)


def test_a_second_path_of_the_same_trial_needs_a_sample_number():
    with pytest.raises(
        DataError, match=r"record 1, image, task, subject, sample: 'a.jpg', None, '1', 0 is also record 0"
    ):
        ScanpathSet.from_paths([record(), record(x=[1, 2, 3])])
    assert len(ScanpathSet.from_paths([record(), record(sample=1)])) == 2


@pytest.mark.parametrize(
    ("rule", "count", "records"),
    [
        ("zero_duration", 1, [{"duration": [0.1, 0, 0.1]}]),
        ("off_image", 2, [{"x": [10, 800, 20]}, {"image": "b.jpg", "y": [-1, 2, 3]}]),
        ("duration_unit", 3, [{"duration": [0.0002, 0.0001, 0.0003]}]),
        ("duration_unit", 3, [{"duration": [200, 100, 300]}]),
        ("identical_paths", 1, [{}, {"subject": 2}, {"image": "b.jpg"}]),
        ("image_in_several_splits", 1, [{"split": "train"}, {"subject": 2, "x": [1, 2, 3], "split": "test"}]),
        ("subject_in_several_splits", 1, [{"split": "train"}, {"image": "b.jpg", "split": "test"}]),
        (
            "forced_centre",
            2,
            [{"x": [400, 1, 2], "y": [300, 1, 2]}, {"subject": 2, "x": [399, 9, 9], "y": [300, 1, 2]}],
        ),
    ],
)
def test_notices(rule, count, records):
    found = notices(ScanpathSet.from_paths([record(**changes) for changes in records]))
    assert [(notice.rule, notice.count) for notice in found if notice.rule == rule] == [(rule, count)]
    assert not notices(ScanpathSet.from_paths([record(), record(subject=2, x=[1, 2, 3])]))


def test_long_paths_are_reported():
    short = [record(subject=n, x=[n, 2, 3]) for n in range(20)]
    long = record(subject=99, x=range(50), y=range(50), duration=None)
    (notice,) = notices(ScanpathSet.from_paths([*short, long]))
    assert (notice.rule, notice.count) == ("long_paths", 1)
    assert re.search(r"record 20 with 50", notice.message)


def test_a_million_fixations():
    count = 10**6
    rng = np.random.default_rng(0)
    paths = ScanpathSet.from_columns(
        np.full(count // 10, 10), rng.uniform(0, 800, count), rng.uniform(0, 600, count),
        image=np.arange(count // 10), duration=np.full(count, 0.2), width=800, height=600,
    )  # fmt: skip
    assert [notice.rule for notice in notices(paths)] == ["off_image"]  # 799.5 to 800 is beyond the last pixel
    assert paths.take(np.arange(0, len(paths), 2)).x.shape == (count // 2,)
    x = paths.x.copy()
    x[123456] = np.nan
    with pytest.raises(DataError, match=r"record 12345, x\[6\]"):
        ScanpathSet.from_columns(paths.lengths, x, paths.y, image=np.arange(count // 10))


def test_objects_of_fixations():
    boxes = [[0, 0, 100, 100], [20, 20, 40, 40], [200, 0, 300, 100]]
    x, y = [30, 60, 190, 150, 1000], [30, 60, 50, 0, 50]
    assert assign_objects(x, y, boxes).tolist() == [1, 0, 2, 0, 2]
    assert assign_objects(x, y, boxes, tolerance=20).tolist() == [1, 0, 2, -1, -1]


def test_invalid_samples(data_root):
    """The collected bad records are refused, or reported, as their notes say."""
    for case in json.loads((data_root / SAMPLES).read_text()):
        records = []
        for row in case.get("records", [case.get("record")]):
            fields = {**row, "duration": row.get("duration_ms"), "boxes": row.get("boxes_xyxy")}
            if fields["duration"] is not None:
                fields["duration"] = [value / 1000 for value in fields["duration"]]
            records.append({k: v for k, v in fields.items() if k not in ("duration_ms", "boxes_xyxy")})
        if case["expect"].startswith("error") and "size" not in case["case"]:
            with pytest.raises(DataError):
                ScanpathSet.from_paths([Scanpath(**fields) for fields in records])
        else:
            paths = ScanpathSet.from_paths([Scanpath(**fields) for fields in records])
            if case["expect"].startswith("warning"):
                assert notices(paths), case["case"]
            else:
                with pytest.raises(DataError, match="image size"):
                    paths.sizes()
