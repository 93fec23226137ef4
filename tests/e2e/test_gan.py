"""The recipe of a GAN: two Adams with their own settings, and digits that can be recognized."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tests.support.commands import (
    BIN,
    REPOSITORY,
    Command,
    jobs_in,
    logged_rows,
    offline_runs,
    run,
    run_config,
)

CHANCE = 1 / 10
BRIEFLY = (
    "width=8",
    "batch_size=32",
    "generator.lr=1e-3",
    "discriminator.betas=[0.6,0.99]",
    "adam_monitor.scopes=[model,group]",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
)


@pytest.mark.slow
def test_two_adams_have_own_settings_and_statistics_and_generate_digits(tmp_path: Path) -> None:
    command: Command = [BIN / "python", "-m", "recipes.gan", *BRIEFLY, *jobs_in(tmp_path)]
    finished = run(command, REPOSITORY)
    assert finished.returncode == 0, finished.output
    assert float(finished.after("recognized generated digits: ")) > 3 * CHANCE
    assert float(finished.after("recognized real digits: ")) > 0.9
    assert plt.imread(tmp_path / "generated.png").shape[:2] == (280, 280)
    (offline_run,) = offline_runs(tmp_path)
    assert_recorded(offline_run)
    assert_measured(offline_run)


def assert_recorded(offline_run: Path) -> None:
    recorded = run_config(offline_run)["optimizer"]
    assert (recorded["generator"]["lr"], recorded["generator"]["betas"][0]) == (1e-3, 0.5)
    assert recorded["discriminator"]["betas"] == [0.6, 0.99]


def assert_measured(offline_run: Path) -> None:
    rows = logged_rows(offline_run)
    for name in ("generator", "discriminator"):
        for scope in ("", "group/decay/", "group/no_decay/"):
            key = f"adam_gradient/optimizer/{name}/{scope}grad_norm"
            assert all(row[key] > 0 for row in rows.values())
    rates = {row["adam_schedule/optimizer/generator/lr"] for row in rows.values()}
    assert all(rate == pytest.approx(1e-3) for rate in rates)
