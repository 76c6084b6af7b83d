"""One test per row of the manifest; a row without a runner fails, nothing is skipped."""

import pytest

from tests.golden.case import golden_dir, load_cases
from tests.golden.runners import discover

RUNNERS = discover()


@pytest.mark.golden
@pytest.mark.parametrize("case", load_cases(golden_dir()), ids=lambda case: case.id)
def test_golden(case):
    word = case.row["runner"]
    assert word in RUNNERS, f"{case.id}: no runner for {word!r}; register it in tests/<area>/golden_runners.py"
    assert case.path.is_file(), f"{case.id}: {case.path} does not exist"
    RUNNERS[word](case)
    assert not case.unchecked(), f"{case.id}: the runner compared nothing with {', '.join(case.unchecked())}"
