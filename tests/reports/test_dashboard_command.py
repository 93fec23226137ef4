"""`lightning-adam dashboard` with W&B's client, against a local server."""

import dataclasses
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from lightning_adam.cli import main
from tests.support.commands import environment, run
from tests.support.tables import each_row
from tests.support.wandb_server import ENTITY, SUMMARY, Refusal, Run, WandbServer
from tests.support.wandb_server import variables as client_variables

PROJECT = f"{ENTITY}/project"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server with one project; the client is logged in."""
    with WandbServer("project") as found:
        for name, value in found.variables.items():
            monkeypatch.setenv(name, value)
        # The client reads the environment once.
        wandb.teardown()
        yield found
        wandb.teardown()


def error_of(capsys: pytest.CaptureFixture[str], project: str = PROJECT) -> str:
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["dashboard", project])
    beginning = f"lightning-adam dashboard: {project}: "
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(beginning)]
    return line.removeprefix(beginning)


def titles(spec: dict[str, Any]) -> list[tuple[str, list[str | None]]]:
    return [
        (section["name"], [panel["config"].get("chartTitle") for panel in section["panels"]])
        for section in spec["section"]["panelBankConfig"]["sections"]
    ]


def test_existing_workspace_is_updated_and_keeps_the_filter_of_the_runs(
    server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["dashboard", PROJECT])
    (identifier,) = server.views
    view = server.views[identifier]
    printed = f"workspace: {server.url}/{PROJECT}?nw=lightningadam\n"
    assert capsys.readouterr().out == printed
    assert (view.project, view.type, view.display_name) == ("project", "project-view", "Adam")
    as_first_saved = json.loads(view.spec)
    # A user filters the runs and deletes the charts.
    changed = json.loads(view.spec)
    changed["section"]["runSets"][0]["search"]["query"] = "baseline"
    changed["section"]["panelBankConfig"]["sections"] = []
    server.views[identifier] = dataclasses.replace(view, spec=json.dumps(changed))
    main(["dashboard", PROJECT])
    assert capsys.readouterr().out == printed
    assert list(server.views) == [identifier]
    saved = json.loads(server.views[identifier].spec)
    assert saved["section"]["runSets"][0]["search"]["query"] == "baseline"
    assert titles(saved) == titles(as_first_saved)
    assert len(server.charts) == 1


def test_runs_are_compared_by_the_metric_of_the_newest_run(server: WandbServer) -> None:
    recorded = {"lightning_adam": {"run": {"metric": {"name": "accuracy", "mode": "max"}}}}
    logged = {SUMMARY: {0: json.dumps({"train/loss": 1.0, "val/acc": 0.9, "val/loss": 2.0})}}
    another = Run("another", {"lightning_adam": {"run": {"metric": {"name": "other"}}}})
    with each_row() as row:
        for title, runs, arguments, metric in (
            ("no run", [], [], None),
            (
                "recorded",
                [Run("project", {}, logged), Run("project", recorded, logged)],
                [],
                "accuracy",
            ),
            (
                "not recorded",
                [Run("project", recorded), Run("project", {}, logged)],
                [],
                "val/loss",
            ),
            (
                "nothing logged",
                [Run("project", {"lightning_adam": {"run": {"metric": None}}})],
                [],
                None,
            ),
            ("as requested", [Run("project", recorded)], ["--metric", "val/acc"], "val/acc"),
        ):
            with row(title):
                server.runs = dict(zip("abc", [*runs, another], strict=False))
                main(["dashboard", PROJECT, *arguments])
                (view,) = server.views.values()
                assert re.findall('"summary:(.*?)"', view.spec) == [metric] * (metric is not None)


def test_missing_project_permission_or_login_is_an_error(
    server: WandbServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with each_row() as row:
        with row("another project"):
            sentence = "Train with WandbLogger(project='another') first"
            assert sentence in error_of(capsys, f"{ENTITY}/another")
        for each in Refusal:
            with row(each):
                server.refusal = each
                assert "Run wandb login as a user with write access" in error_of(capsys)
                assert not server.views
        with row("not logged in"):
            monkeypatch.setenv("WANDB_API_KEY", "")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            wandb.teardown()
            assert error_of(capsys).endswith("Run wandb login")


@pytest.mark.slow
def test_server_that_does_not_answer_is_reported_in_one_line(tmp_path: Path) -> None:
    """Runs in a process, because the client retries for 20 seconds."""
    # Bound, so that no other server takes the port, but without a listener.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        variables = environment() | client_variables(f"http://127.0.0.1:{closed.getsockname()[1]}")
        finished = run(["lightning-adam", "dashboard", PROJECT], tmp_path, variables)
    assert finished.returncode == 1, finished.output
    assert "Traceback" not in finished.output
    assert "W&B did not answer" in finished.after(f"lightning-adam dashboard: {PROJECT}: ")
