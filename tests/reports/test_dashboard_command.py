"""`lightning-adam dashboard`, with W&B's client, against a server on this machine."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from lightning_adam.cli import main
from tests.support.commands import environment, run
from tests.support.tables import each_row
from tests.support.wandb_server import ENTITY, Refusal, WandbServer

PROJECT = f"{ENTITY}/project"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server with one project, that the client is logged in to."""
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
    # Somebody filters the runs and deletes the panels.
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
                assert "Run wandb login as a user who may write there" in error_of(capsys)
                assert not server.views
        with row("not logged in"):
            monkeypatch.setenv("WANDB_API_KEY", "")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
            wandb.teardown()
            assert error_of(capsys).endswith("Run wandb login")


@pytest.mark.slow
def test_server_that_does_not_answer_is_reported_in_one_line(tmp_path: Path) -> None:
    """In a process, since the client tries for twenty seconds."""
    with WandbServer("project") as server:
        pass
    variables = environment() | server.variables
    finished = run(["lightning-adam", "dashboard", PROJECT], tmp_path, variables)
    assert finished.returncode == 1, finished.output
    assert "Traceback" not in finished.output
    assert "W&B did not answer" in finished.after(f"lightning-adam dashboard: {PROJECT}: ")
