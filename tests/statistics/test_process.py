"""Memory and threads of a measurement, and the machine code of the CPU kernel."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import BIN, REPOSITORY, environment, run

MODULE = "tests.statistics.measuring_process"
on_linux = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="reads what Linux says is loaded"
)


def results(*checks: str, cold: bool = False, **variables: str) -> Any:
    command = [str(BIN / "python"), "-m", MODULE, *checks]
    finished = run(command, REPOSITORY, environment(**variables), cold=cold)
    assert finished.returncode == 0, finished.output
    return json.loads(finished.lines[-1])


@pytest.fixture(scope="module")
def measured() -> Any:
    return results("temporaries", "threads")


@on_linux
def test_temporaries_stay_below_32_megabytes(measured: Any) -> None:
    peaks = measured["temporaries"]
    assert peaks.pop("copy") > 32, "the method does not detect the memory peak"
    assert len(peaks) == 4
    assert max(peaks.values()) < 32, peaks


@on_linux
def test_no_second_openmp_is_loaded_and_forked_workers_can_measure(measured: Any) -> None:
    assert measured["threads"] == {"loaded": [], "workers": [True, True]}


@pytest.mark.slow
@pytest.mark.skipif("x86" not in os.uname().machine, reason="the names of x86's instructions")
def test_compiled_loops_use_vector_instructions(tmp_path: Path) -> None:
    """A single int64, or an index that may be negative, prevents vectorization."""
    # Code from numba's cache cannot be inspected.
    loops = results("assembly", cold=True, NUMBA_CACHE_DIR=str(tmp_path))["assembly"]
    assert len(loops) == 8
    for code in loops:
        assert re.search(r"\bv?sqrtps\b", code), "no square roots of several elements at once"
        assert re.search(r"\bv?divps\b", code)
        assert not re.search(r"gather[dq](ps|d)\b", code), "elements are not read in a row"
