"""The doctor: documented report, real work, and a missing package told with its cure."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest

from saccade.apps import checks
from saccade.apps.cli import main
from saccade.apps.doctor import PROFILES, Check, Finding, examine
from tests.helpers import run_cli

# Refuses imports as if the packages named in the first argument were not installed, then runs the command.
WITHOUT = """
import sys

blocked = sys.argv[1].split(",")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from saccade.apps.cli import main
sys.exit(main(sys.argv[2:]))
"""


def report_without(packages: str, profile: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Return exit code and findings by name of a doctor that finds some packages missing."""
    command = [sys.executable, "-c", WITHOUT, packages, "doctor", "--profile", profile, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["failed"] == sum(check["status"] == "FAIL" for check in report["checks"])
    return done.returncode, {check["name"]: check for check in report["checks"]}


def check_report(text: str, profile: str) -> dict:
    """Check the documented keys and return the report."""
    report = json.loads(text)
    assert list(report) == ["profile", "checks", "passed", "warnings", "failed"]
    assert report["profile"] == profile
    assert [check["name"] for check in report["checks"]] == [check.name for check in PROFILES[profile]]
    for check in report["checks"]:
        assert list(check) == ["name", "status", "message", "fix", "seconds"]
        assert check["status"] in ("PASS", "WARN", "FAIL")
        assert check["message"]
        assert "\n" not in check["message"]
        assert check["seconds"] >= 0
        assert check["status"] != "FAIL" or check["fix"]
    assert report["passed"] + report["warnings"] + report["failed"] == len(report["checks"])
    return report


def test_healthy_base(capsys):
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert check_report(out, "base")["failed"] == 0


@pytest.mark.slow
def test_healthy_all():
    done = run_cli("doctor", "--profile", "all", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert check_report(done.stdout, "all")["failed"] == 0


def test_missing_packages_fail_where_they_are_needed():
    code, found = report_without("openslide,pyarrow,zarr", "wsi")
    assert code == 1
    assert found["openslide"]["status"] == "FAIL"
    assert found["openslide"]["fix"].startswith("pip install openslide-python")
    assert "No module named 'openslide'" in found["openslide"]["message"]
    assert {found[name]["status"] for name in ("parquet", "zarr")} == {"WARN"}
    assert found["parquet"]["fix"] == "pip install 'saccade[parquet]'"
    assert found["tiff"]["status"] == "PASS"


@pytest.mark.slow
def test_missing_torch_is_reported():
    code, found = report_without("torch,timm", "base")
    assert code == 1
    assert found["model"]["status"] == found["attention"]["status"] == "FAIL"
    assert found["tables"]["status"] == "PASS"


def test_developers_need_the_optional_formats():
    assert all(not check.optional for check in PROFILES["dev"] + PROFILES["all"])
    assert {check.name for check in PROFILES["base"] if check.optional} == {"parquet", "zarr"}
    names = [check.name for check in PROFILES["all"]]
    assert len(names) == len(set(names))
    assert {check.name for checks in PROFILES.values() for check in checks} == set(names)


def test_wrong_version_is_told(monkeypatch):
    monkeypatch.setattr(
        checks.metadata, "requires", lambda name: ["numpy>=99", "no-such-package>=1", 'x>=1; extra=="y"']
    )
    (finding,) = examine((Check("versions", checks.check_versions),))
    assert finding.status == "FAIL"
    assert "is not >=99" in finding.message
    assert "no-such-package is not installed" in finding.message
    assert finding.fix == "pip install 'numpy>=99' 'no-such-package>=1'"


def test_a_check_that_raises_has_failed():
    def wrong(folder):
        assert not list(folder.iterdir())
        (folder / "left.txt").touch()
        raise RuntimeError("two and two are five")

    finding, again = examine((Check("sums", wrong, "numpy"), Check("sums", wrong)))
    assert (finding.status, finding.message) == ("FAIL", "sums: RuntimeError: two and two are five")
    assert "numpy" in finding.fix
    assert again.message == finding.message, "every check gets an empty folder"


def test_wrong_numbers_are_noticed(monkeypatch):
    import saccade.batch

    monkeypatch.setattr(saccade.batch, "write_table", lambda path, rows: path.write_text("path,prob_1\nx,1\n"))
    (finding,) = examine((Check("tables", checks.check_tables),))
    assert finding.status == "FAIL"
    assert ".csv comes back changed" in finding.message


def test_screen(capsys):
    assert main(["doctor"]) == 0
    header, *rows, totals = capsys.readouterr().out.splitlines()
    assert header == "saccade doctor   profile base"
    assert {row.split()[0] for row in rows} <= {"PASS", "WARN"}
    assert totals.endswith(" 0 failed")
    assert len(rows) == len(PROFILES["base"])
    assert [field.name for field in fields(Finding)] == ["name", "status", "message", "fix", "seconds"]
