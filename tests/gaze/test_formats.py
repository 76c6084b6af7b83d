"""Files of scanpaths: round trips, what readers convert, guesses, and messages of what is wrong."""

import json
import pickle
import warnings

import h5py
import numpy as np
import pytest

from saccade.errors import ConfigError, DataError
from saccade.gaze import Scanpath, ScanpathSet
from saccade.gaze.formats import (
    FORMATS,
    apply_off_image,
    find_format,
    from_events,
    from_pysaliency,
    read_scanpaths,
    to_events,
    to_pysaliency,
    write_scanpaths,
)
from saccade.gaze.validation import ScanpathWarning

BOXES = np.array([[0.0, 0, 400, 300], [400, 0, 800, 300], [0, 300, 400, 600]])
BOXES.flags.writeable = False


def some(*, durations=True, objects=True):
    """Search paths of two viewers on two images, one of them twice."""
    rng = np.random.default_rng(0)
    records = []
    for image, subject, sample, count in [
        ("a.jpg", "1", 0, 4),
        ("a.jpg", "2", 0, 3),
        ("b.jpg", "1", 0, 5),
        ("b.jpg", "2", 0, 3),
    ]:
        x, y = np.round(rng.uniform(0, 799, count), 1), np.round(rng.uniform(0, 299, count), 1)
        records.append(
            Scanpath(
                image, x, y,
                duration=rng.integers(50, 400, count) / 1000 if durations else None,
                subject=subject, sample=sample, task="cup", condition="present", width=800, height=600,
                objects=(x > 400).astype(int) if objects else None, target_object=1, target_box=BOXES[1], boxes=BOXES,
                split="train", meta={"correct": 1},
            )
        )  # fmt: skip
    return ScanpathSet.from_paths(records)


KEPT = {  # fields that come back, beside image, x, y and subject
    "csv": "duration task condition split width height sample objects target_object target_box",
    "pymovements": "duration task",
    "coco": "duration task condition split width height target_box meta",
    "osie": "duration task width height",
    "amazon": "task condition width height target_box target_object",
    "hdf5": "duration task condition split width height sample objects target_object target_box boxes meta",
    "pysaliency": "duration task condition split width height target_box",
    "multimatch": "duration",
    "oat": "task condition objects target_object",
}


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_round_trip(known, tmp_path):
    paths = some()
    if known.name == "multimatch":
        paths = paths[:1]
    file = tmp_path / f"paths{known.extensions[0]}"
    write_scanpaths(paths, file, format=known.name)
    options = {"coco": {"size": (800, 600)}, "multimatch": {"image": "a.jpg"}, "oat": {"allow_pickle": True}}
    got = read_scanpaths(file, format=known.name, **{"grid": (2, 2), **options.get(known.name, {})})
    assert len(got) == len(paths)
    for old, new in zip(paths, got, strict=True):
        np.testing.assert_array_equal(new.x, old.x)
        np.testing.assert_array_equal(new.y, old.y)
        if known.name != "oat":
            assert new.image == old.image
        if known.name != "multimatch":
            assert new.subject == old.subject
        for name in KEPT[known.name].split():
            if name in ("duration", "target_box", "boxes", "objects"):
                np.testing.assert_allclose(getattr(new, name), getattr(old, name), rtol=1e-15, err_msg=name)
            else:
                assert getattr(new, name) == getattr(old, name), name


def test_hdf5_keeps_everything_exactly(tmp_path):
    """Also numbers without a short decimal, what is missing in some paths only, empty strings, and shared boxes."""
    third = 1 / 3
    paths = ScanpathSet.from_paths(
        [
            Scanpath("a", [third, 2], [1, np.pi], duration=[third, 0.1], task="", boxes=BOXES, objects=[2, -1]),
            Scanpath("b", [1], [2], boxes=BOXES, meta={"rt": third, "names": ["x"]}),
            Scanpath("ü", [1], [2], subject=7, sample=3, target_box=[0, 0, third, third]),
        ]
    )
    write_scanpaths(paths, tmp_path / "p.h5")
    got = read_scanpaths(tmp_path / "p.h5")
    for name in (
        "offsets",
        "x",
        "y",
        "duration",
        "objects",
        "width",
        "target_box",
        "sample",
        "image",
        "task",
        "subject",
    ):
        np.testing.assert_array_equal(getattr(got, name), getattr(paths, name))
    assert got.meta == paths.meta
    assert got.boxes[0] is got.boxes[1]
    assert got.boxes[2] is None
    assert [path.task for path in got] == ["", None, None]


def test_formats_are_told_apart(tmp_path):
    for known in FORMATS:
        file = tmp_path / f"{known.name}{known.extensions[0]}"
        write_scanpaths(some()[:1], file, format=known.name)
        assert find_format(file) is known
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"other.json does not look like scanpaths; give the format, one of csv,"):
        find_format(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"Unknown format 'coca'.*Did you mean 'coco'"):
        read_scanpaths(tmp_path / "csv.csv", format="coca")
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def csv_file(folder, *lines, header="image,subject,index,x_px,y_px,duration_ms,width_px,height_px"):
    file = folder / "human.csv"
    file.write_text("\n".join([header, *lines]) + "\n")
    return file


def test_rows_in_any_order(tmp_path):
    """Rows of viewers mixed and unsorted: index puts them in order."""
    file = csv_file(
        tmp_path, "a,1,1,11,1,100,800,600", "a,2,0,20,2,100,800,600", "b,1,0,30,3,100,800,600",
        "a,1,0,10,1,200,800,600", "a,2,5,25,2,100,800,600", "a,1,2,12,1,100,800,600",
    )  # fmt: skip
    paths = read_scanpaths(file)
    assert [(path.image, path.subject, path.x.tolist()) for path in paths] == [
        ("a", "1", [10, 11, 12]),
        ("a", "2", [20, 25]),
        ("b", "1", [30]),
    ]
    assert paths[0].duration.tolist() == [0.2, 0.1, 0.1]
    bare = csv_file(tmp_path, "a,1,2", "a,3,4", header="image,x_px,y_px")
    assert read_scanpaths(bare)[0].x.tolist() == [1, 3]
    assert read_scanpaths(bare, size=(50, 40))[0].width == 50


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,1,0,10,1,100,800,600", "a,1,1,ten,1,100,800,600"], "human.csv line 3, x_px: 'ten' is not a number"),
        (["a,1,0,10,1,100,800,600", "a,1,1,,1,100,800,600"], r"human.csv line 3, x\[1\]: nan is not a finite"),
        (["a,1,1,10,1,100,800,600", "a,1,0,nan,1,100,800,600"], r"human.csv line 3, x\[0\]: nan"),
        (["a,1,0,10,1,-5,800,600"], r"human.csv line 2, duration\[0\]: -0.005 s is negative"),
        (["a,1,0,10,1,5,800,600", "a,1,1,10,1,,800,600"], r"human.csv line 3, duration\[1\]: nan"),
        (["a,1,0,10,1,100,800,600", "a,1,0,10,2,100,800,600"], "line 3, index: 0 is also line 2 of the same path"),
        (["a,1,0,10,1,100,800,600", "a,1,1,10,2,100,640,600"], r"line 3, width_px: 640.0 differs from 800.0 in line 2"),
        (["a,1,0.5,10,1,100,800,600"], "line 2, index: 0.5 is not a whole number"),
        (["a,1,0,10,1,100,800"], "human.csv line 2 has 7 cells, the header 8"),
    ],
)
def test_bad_rows_are_named(lines, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_scanpaths(csv_file(tmp_path, *lines))


def test_tables_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"human.csv lacks the columns y_px; its header has image, x_px"):
        read_scanpaths(csv_file(tmp_path, header="image,x_px"))
    empty = csv_file(tmp_path)
    assert len(read_scanpaths(empty)) == 0
    with pytest.raises(FileNotFoundError):
        read_scanpaths(tmp_path / "nothing.csv")


def test_a_large_table(tmp_path):
    """A hundred thousand fixations, shuffled, come back in order."""
    count, each = 10_000, 10
    rng = np.random.default_rng(0)
    paths = ScanpathSet.from_columns(
        np.full(count, each), rng.uniform(0, 799, count * each), rng.uniform(0, 599, count * each),
        image=np.arange(count), width=800, height=600,
    )  # fmt: skip
    file = tmp_path / "large.csv"
    write_scanpaths(paths, file)
    header, *lines = file.read_text().splitlines()
    rng.shuffle(lines)
    file.write_text("\n".join([header, *lines]))
    got = read_scanpaths(file)
    order = np.argsort(got.image.astype(int))
    np.testing.assert_array_equal(got.take(order).x, paths.x)


def write_json(folder, document, name="r.json"):
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder / name


COCO = {"name": "1.jpg", "subject": 1, "task": "cup", "X": [840.0, 700], "Y": [528, 402], "T": [201, 164], "length": 2}


def test_coco_search18(tmp_path):
    rows = [
        {**COCO, "bbox": [377, 120, 88, 213], "split": "valid", "correct": 1, "RT": 900},
        {**COCO, "subject": 2, "X": [1, 2]},
    ]
    paths = read_scanpaths(write_json(tmp_path, rows), size=(1680, 1050))
    assert paths[0].target_box.tolist() == [377, 120, 465, 333]
    assert paths[0].duration.tolist() == [0.201, 0.164]
    assert (paths[0].split, paths[0].width, paths[0].meta) == ("val", 1680, {"correct": 1, "RT": 900})
    assert read_scanpaths(write_json(tmp_path, [{**COCO, "task": "none"}]), size=(1680, 1050))[0].task is None


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        ([COCO], None, "r.json does not say its coordinates: give the size, 1680x1050"),
        ([COCO], (512, 320), r"r.json: 100% of the fixations lie outside 512x320 \(largest X 840, largest Y 528\)"),
        (
            [{**COCO, "X": [84, 70], "Y": [1, 2], "subject": n} for n in (1, 2)],
            (1680, 1050),
            "all fixations fit 512x320",
        ),
        (
            [COCO, {**COCO, "subject": 2, "T": [1, 2, 3]}],
            (1680, 1050),
            "r.json record 1, duration: 3 values, but x has 2",
        ),
        ([{**COCO, "length": 3}], (1680, 1050), "r.json record 0, length: 3, but X has 2 values"),
        ([{**COCO, "X": [1, "a"]}], (1680, 1050), r"record 0, X: \[1, 'a'\] is not a list of numbers"),
        ([{**COCO, "X": [1, None]}], (1680, 1050), r"record 0, x\[1\]: nan"),
        ([{"name": "a"}], (1680, 1050), "record 0, X: missing; the record has name"),
        ([COCO, COCO], (1680, 1050), "'1.jpg', 'cup', '1', 0 is also r.json record 0; number repetitions"),
    ],
)
def test_coco_refused(rows, size, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        read_scanpaths(write_json(tmp_path, rows), format="coco", size=size)


def test_repetitions_are_numbered_on_request(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScanpathWarning)
        paths = read_scanpaths(
            write_json(tmp_path, [COCO, COCO, {**COCO, "subject": 2}]), size=(1680, 1050), repeats="number"
        )
    assert paths.sample.tolist() == [0, 1, 0]
    with pytest.raises(ConfigError, match="repeats is"):
        read_scanpaths(tmp_path / "r.json", size=(1680, 1050), repeats="drop")


def test_osie_counts_from_one(tmp_path):
    row = {
        "image": "1.jpg",
        "width": 800,
        "height": 600,
        "subject": 0,
        "x": [1.0, 395.5],
        "y": [1, 2],
        "duration_ms": [246, 60],
    }
    paths = read_scanpaths(write_json(tmp_path, [row]))
    assert paths.x.tolist() == [0, 394.5]
    assert paths.duration.tolist() == [0.246, 0.06]
    with pytest.raises(ConfigError, match=r"r.json is not JSON"):
        read_scanpaths(write_json(tmp_path, "[1, "), format="osie")
    with pytest.raises(ConfigError, match="holds a dict, expected a list"):
        read_scanpaths(write_json(tmp_path, {}), format="osie")
    with pytest.raises(DataError, match=r"r.json record 0 is no object but 3"):
        read_scanpaths(write_json(tmp_path, [3]), format="osie")


def test_identical_viewers_are_reported(tmp_path):
    """The fault of a published preparation: every viewer holds the last one's path."""
    entry = {
        "fixations": {"1": [[1, 2], [3, 4]], "2": [[1, 2], [3, 4]]},
        "ground_truth": [{"xmin": 0, "xmax": 9, "ymin": 0, "ymax": 9}],
        "size": {"width": 140, "height": 60},
        "target": "target_3.jpg",
    }
    with pytest.warns(
        ScanpathWarning, match=r"r.json: 1 paths are identical to another viewer's .* subjects 1 and 2 on 7.jpg"
    ):
        paths = read_scanpaths(write_json(tmp_path, {"7.jpg": entry}))
    assert paths.task.tolist() == ["target_3"] * 2
    assert len(paths.boxes[0]) == 84
    with pytest.raises(DataError, match=r"r.json 7.jpg record 0, size: missing"):
        read_scanpaths(write_json(tmp_path, {"7.jpg": {"fixations": {}}}), format="amazon")


def test_off_image_policies():
    paths = ScanpathSet.from_paths(
        [
            Scanpath("a", [-5, 10, 900], [1, 700, 3], duration=[0.1, 0.2, 0.3], width=800, height=600),
            Scanpath("b", [-5], [1], duration=[0.1], width=800, height=600),
            Scanpath("c", [5], [1], duration=[0.4], objects=[2], width=800, height=600),
        ]
    )
    assert apply_off_image(paths, "keep") is paths
    clipped = apply_off_image(paths, "clip")
    assert clipped.x.tolist() == [0, 10, 799, 0, 5]
    assert clipped.y.tolist() == [1, 599, 3, 1, 1]
    dropped = apply_off_image(paths, "drop")
    assert [path.image for path in dropped] == ["c"]
    assert dropped[0].duration.tolist() == [0.4]
    assert dropped[0].objects.tolist() == [2]
    with pytest.raises(DataError, match=r"record 0, x, y: \(-5, 1\) is outside 800x600"):
        apply_off_image(paths, "error")
    with pytest.raises(ConfigError, match=r"off_image is one of .*Did you mean 'clip'"):
        apply_off_image(paths, "clap")


def test_pickles_are_read_on_request_and_run_nothing(tmp_path):
    file = tmp_path / "trials.pickle"
    write_scanpaths(some(), file)
    with pytest.raises(ConfigError, match="is a pickle, which is read on request only"):
        read_scanpaths(file)
    trial = {"id": "Q1", "layout_id": 2, "sub_id": 4, "tgt_id": 9, "package_target": np.array([3]),
             "package_seq": np.array([1, 22]), "X": np.array([10.0, 1600]), "Y": np.array([200.0, 900])}  # fmt: skip
    file.write_bytes(pickle.dumps([trial]))
    (path,) = read_scanpaths(file, allow_pickle=True)
    assert path.objects.tolist() == [0, 21]
    assert (path.image, path.target_object, path.width) == ("Q1_2", 2, 1680)
    assert path.boxes.shape == (22, 4)
    assert path.boxes[:, 3].max() == 1050
    marker = tmp_path / "ran"
    file.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % str(marker).encode())
    with pytest.raises(DataError, match=r"asks for posix.system; only plain values and numpy arrays"):
        read_scanpaths(file, allow_pickle=True)
    assert not marker.exists()
    file.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not a pickle"):
        read_scanpaths(file, allow_pickle=True)


def test_pysaliency_fields(tmp_path):
    content = to_pysaliency(some())
    assert content["n"].tolist() == [0, 0, 1, 1]
    assert content["scanpath_attributes"]["subject"].tolist() == [1, 2, 1, 2]
    got = from_pysaliency(content)
    np.testing.assert_array_equal(got.duration, some().duration)
    padded = {"xs": np.array([[1.0, 2, np.nan], [3, 4, 5]]), "ys": np.array([[1.0, 2, np.nan], [3, 4, 5]]), "n": [1, 0]}
    assert from_pysaliency(padded).lengths.tolist() == [2, 3]
    write_scanpaths(some(), tmp_path / "p.hdf5", format="pysaliency")
    with h5py.File(tmp_path / "p.hdf5") as file:
        assert file.attrs["type"] == b"Scanpaths"
        assert json.loads(file["fixation_attributes"].attrs["__attributes__"]) == ["durations", "ts"]
    named = read_scanpaths(tmp_path / "p.hdf5", images=["one", "two"], size=(900, 700))
    assert named.image.tolist() == ["one", "one", "two", "two"]
    assert named.width[0] == 900
    with pytest.raises(ConfigError, match="n counts to image 1, but 1 names are given"):
        read_scanpaths(tmp_path / "p.hdf5", images=["one"])
    (tmp_path / "no.h5").write_bytes(b"\x89HDF\r\n\x1a\nrest")
    with pytest.raises(ConfigError, match=r"no.h5 is not an HDF5 file"):
        read_scanpaths(tmp_path / "no.h5")


def test_pymovements_events():
    frame = {
        "trial": [1, 1, 1, 2],
        "name": ["fixation.ivt", "saccade", "fixation.ivt", "fixation"],
        "onset": [300, 200, 0, 10],
        "offset": [350, 300, 200, 30],
        "duration": [50, 100, 200, 20],
        "location": [[7.0, 8.0], None, [5.0, 6.0], [1.0, 2.0]],
    }
    paths = from_events(frame, image="trial", subject=None)
    assert paths[0].x.tolist() == [5, 7]
    assert paths[0].duration.tolist() == [0.2, 0.05]
    assert len(paths) == 2
    with pytest.raises(ConfigError, match="Events lack image, subject; they have trial, name"):
        from_events(frame)
    table = to_events(some())
    assert table["onset"][0] == table["onset"][4] == 0
    assert table["offset"][0] == table["onset"][1]


def test_shared_recordings(data_root):
    shared = data_root / "gaze"
    with pytest.warns(ScanpathWarning, match="long"):
        osie = read_scanpaths(shared / "osie" / "osie_fixations.json")
    assert repr(osie) == "ScanpathSet(900 paths, 8349 fixations, 60 images, 15 subjects)"
    with pytest.warns(ScanpathWarning, match="long"):
        amazon = read_scanpaths(shared / "amazon_books" / "amazon_search.json")
    assert (len(amazon), len(amazon.x)) == (480, 7064)
    derived = json.loads((shared / "amazon_books" / "amazon_grid_objects_derived.json").read_text())
    for path in amazon:
        assert path.objects.tolist() == derived[path.image]["objects"][path.subject]
        assert path.target_object == derived[path.image]["target_object"]
    for file in sorted((shared / "studyforrest").iterdir())[:5]:
        assert len(read_scanpaths(file, size=(1280, 720))) == 1
    with pytest.warns(ScanpathWarning, match="1 subjects stand in several splits"):
        search = read_scanpaths(shared / "format_samples" / "coco_search18_sample_SYNTHETIC.json", size=(1680, 1050))
    assert search.lengths.tolist() == [4, 2, 5, 2]
