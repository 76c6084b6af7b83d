"""The demo's frame and pieces; the README's test runs all of it."""

import json
import re

import pytest

from saccade.apps.cli import main
from saccade.apps.demo import MARKER, PARTS
from saccade.apps.demo_report import Outcome, Session, page, table
from saccade.errors import SaccadeError
from tests.helpers import run_cli


def test_an_unknown_part_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["demo", "slide", "-o", str(tmp_path / "demo")]) == 2
    assert "no part 'slide'. Did you mean 'slides'? It has images, slides" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_things_is_not_replaced(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert "holds other things" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert not (tmp_path / MARKER).exists()


def test_a_command_that_ends_otherwise_than_expected_stops_the_demo():
    session = Session()
    session.call("saccade list configs 'image/d*'")
    with pytest.raises(SaccadeError, match=r"list nonsense` ended with exit code 2, expected 0"):
        session.call("saccade list nonsense")
    assert session.lines == ["saccade list configs 'image/d*'", "saccade list nonsense"]


def test_the_report_begins_with_a_table_of_its_parts_and_escapes_what_it_is_given():
    values = {name: "" for name in ("train_images", "scene_px", "wide_px", "predictions")}
    outcome = Outcome("images", PARTS["images"], "a < b", 12.3, 9.8, ["saccade test <run> & more"], values)
    shown = page([outcome])
    assert re.search(
        r'<tr><td><a href="#images">images</a></td><td>.*</td><td>a &lt; b</td><td>12 s</td><td>10 s</td></tr>', shown
    )
    assert '<section id="images">' in shown
    assert "$ saccade test &lt;run&gt; &amp; more" in shown
    assert "$" not in re.sub(r"\$ saccade", "", shown), "a placeholder was left"


def test_tables_round_and_escape():
    assert table(["<a>"], [[0.12345], ["x"]]) == (
        "<table>\n<tr><th>&lt;a&gt;</th></tr>\n<tr><td>0.123</td></tr>\n<tr><td>x</td></tr>\n</table>"
    )


@pytest.mark.slow
def test_slides(tmp_path):
    """From drawn slides to heatmaps, in a process of its own; attention finds the lesion better than chance."""
    done = run_cli("demo", "slides", "-o", "demo", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img[^>]* src="([^"]+)"', report)
    assert len(pictures) == 8
    assert all((tmp_path / "demo" / picture).stat().st_size > 1000 for picture in pictures)
    *_, share = found = [float(number) for number in re.findall(r"(?:ACMIL|ABMIL|chance) (\d\.\d+)", done.stdout)]
    assert len(found) == 5
    assert min(found[:2]) > 0.75, "area under the curve, 14 slides"
    assert min(found[2:4]) > 3 * share, "average precision"
    outlines = list((tmp_path / "demo/slides/lesions").glob("*.geojson"))
    assert len(outlines) == 20
    assert json.loads(outlines[0].read_text())["features"]


@pytest.mark.slow
def test_gaze_and_decoding(tmp_path):
    """A small OAT beats random objects; neutral interventions write what the model writes, the others move weight."""
    done = run_cli("demo", "gaze", "decoding", "-o", "demo", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img[^>]* src="([^"]+)"', report)
    assert len(pictures) == 5
    assert all((tmp_path / "demo" / picture).stat().st_size > 1000 for picture in pictures)
    oat, chance, ceiling = (
        float(re.search(rf"{who} (\d\.\d+)", done.stdout)[1]) for who in ("OAT", "objects", "themselves")
    )
    assert chance < oat < ceiling
    assert "6 of 6 methods with neutral settings write what the model writes" in done.stdout
    before, *after = map(
        float, re.findall(r"(?:image|VAR|GIFT|ACT|PAI|VAF) (\d\.\d+)", done.stdout.partition("weight on")[2])
    )
    assert len(after) == 5
    assert sum(abs(mass - before) > 0.01 for mass in after) >= 4
