import json

import pytest
from PIL import Image

from saccade.datasets.robustness_suites import PERTURBATIONS
from saccade.errors import ConfigError
from saccade.vision_backbones.robustness_metrics import ALEXNET_ERRORS
from saccade.vision_backbones.robustness_report import Report, read_reference, write_report

FILES = 50_000
IMAGENET = {"classes": 1000, "all_of_imagenet": True}


def row(kind, severity, errors):
    correct = round(FILES * (1 - errors))
    return {
        "kind": kind,
        "severity": severity,
        "files": FILES,
        "bad_files": 0,
        "correct": correct,
        "correct_top5": correct,
        "unreadable": "",
    }


def alexnet_rows():
    rows = [row(kind, s, e) for kind, errors in ALEXNET_ERRORS.items() for s, e in enumerate(errors, start=1)]
    return [row("clean", 0, 0.43478), *rows]


def test_alexnet_from_counts_to_paper(tmp_path):
    report = Report("imagenet-c", "alex_net", IMAGENET, alexnet_rows())
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"]["mCE_percent"] == pytest.approx(100)
    assert written["by_kind"]["fog"]["CE_percent"] == pytest.approx(100)
    assert written["by_kind"]["fog"]["relative_CE_percent"] == pytest.approx(100)
    assert "mCE_percent,100.0\n" in (tmp_path / "metrics.csv").read_text()
    head, _, cells, _, caption = (tmp_path / "table.md").read_text().splitlines()
    assert head.split(" | ")[:4] == ["| Model", "Clean top-1 (%)", "mCE (%)", "Relative mCE (%)"]
    assert head.count("|") == cells.count("|") == 1 + 1 + 5 + 15
    assert set(cells.split(" | ")[6:]) == {"100.0", "100.0 |"}
    assert "CE (%), AlexNet = 100" in caption
    text = (tmp_path / "table.tex").read_text()
    assert r"alex\_net & 56.5 & 100.0 & 100.0 &" in text
    assert r"\multicolumn{3}{c}{Noise} & \multicolumn{4}{c}{Blur} & \multicolumn{4}{c}{Weather}" in text
    columns = text.partition(r"\begin{tabular}{")[2].partition("}")[0]
    assert all(line.count("&") == len(columns) - 1 for line in text.splitlines() if line.startswith(("Model", "alex")))
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) > 500


def test_what_was_made_on_the_fly_says_so_in_every_name_of_mce(tmp_path):
    report = Report("corruptions", "m", IMAGENET, alexnet_rows())
    assert report.metrics["mCE_recreated_percent"] == pytest.approx(100)
    assert "mCE_percent" not in report.metrics
    assert "relative_mCE_recreated_percent" in report.metrics
    write_report(report, tmp_path)
    for name in ("metrics.json", "table.md", "table.tex"):
        assert "not comparable" in (tmp_path / name).read_text()
    assert "mCE (recreated)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("suite", ["imagenet-a", "imagenet-p", "imagenet-c"])
def test_every_suite_gets_a_table_and_a_plot(tmp_path, suite):
    values = {"flip_probability": 0.05, "top5_distance": 1.0, "zipf_distance": 0.1}
    rows = {
        "imagenet-a": [row("imagenet-a", 0, 0.4)],
        "imagenet-p": [{"kind": k, "severity": 0, "files": 9, "bad_files": 0, **values} for k in PERTURBATIONS],
        "imagenet-c": [row("fog", 3, 0.25)],
    }[suite]
    report = Report(suite, "m", IMAGENET, rows)
    write_report(report, tmp_path)
    expected = {
        "imagenet-a": "| m | 60.0 | 60.0 |",
        "imagenet-p": "| m | 5.0 | 1.0 | 0.1 | " + " | ".join(["5.0"] * 10) + " |",
        "imagenet-c": "| m | 75.0 | 75.0 |",
    }[suite]
    head, _, cells, *_ = (tmp_path / "table.md").read_text().splitlines()
    assert cells == expected
    assert "ImageNet-A top-1 (%)" in head or suite != "imagenet-a"
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 500


def test_means_of_imagenet_p_need_all_ten():
    values = {"flip_probability": 0.05, "top5_distance": 1.0, "zipf_distance": 0.1, "files": 9, "bad_files": 0}
    assert Report("imagenet-p", "m", {"classes": 9}, [{"kind": k, **values} for k in PERTURBATIONS[:9]]).metrics == {}


def test_reference_tables(tmp_path):
    lines = ["kind,flip_probability,top5_distance,remark", *(f"{k},0.2,3.5,x" for k in PERTURBATIONS)]
    table = tmp_path / "alexnet.csv"
    table.write_text("\n".join(lines))
    assert read_reference(table)["tilt"] == {"flip_probability": 0.2, "top5_distance": 3.5}
    table.write_text("\n".join(lines).replace("tilt,0.2", "tilt,20"))
    with pytest.raises(ConfigError, match="tilt: a flip probability lies between 0 and 1"):
        read_reference(table)
    with pytest.raises(ConfigError, match="Cannot read the reference table"):
        read_reference(tmp_path / "nowhere.csv")
