"""The runs of a search in W&B: one for each run, in one group, with the stage as job type."""

from pathlib import Path

import pytest

from tests.support.commands import (
    environment,
    offline_runs,
    records,
    run_config,
    run_text,
    write_the_project,
)


@pytest.mark.slow
def test_each_run_is_in_the_group_of_the_search(tmp_path: Path) -> None:
    write_the_project(tmp_path)
    program = (tmp_path / "train.py").read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(program.replace("max_epochs=10", "max_epochs=1"))
    tuned = run_text(
        "python train.py -m hydra/sweeper=adam_tune hydra.sweeper.direction=minimize"
        " hydra.sweeper.n_trials=3 hydra.sweeper.study_name=grouped",
        tmp_path,
        environment(CUDA_VISIBLE_DEVICES=""),
    )
    assert tuned.returncode == 0, tuned.output
    runs = [
        next(entry["run"] for entry in records(each) if "run" in entry)
        for each in offline_runs(tmp_path)
    ]
    assert len({each["run_id"] for each in runs}) == 3
    assert {each["run_group"] for each in runs} == {"grouped"}
    assert sorted(each["job_type"] for each in runs) == ["search", "search", "start"]
    lrs = {run_config(each)["optimizer"]["lr"] for each in offline_runs(tmp_path)}
    assert len(lrs) == 3
