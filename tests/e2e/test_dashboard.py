"""`lightning-adam dashboard`, with the real client, against a server of this machine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import (
    BIN,
    BRIEFLY,
    Finished,
    environment,
    offline_runs,
    recipe,
    records,
    run,
)
from tests.support.wandb_server import ENTITY, Refusal, WandbServer

PROJECT = f"{ENTITY}/project"


def dashboard(
    folder: Path, server: WandbServer, project: str = PROJECT, **changes: str
) -> Finished:
    variables = environment() | server.variables | changes
    return run([BIN / "lightning-adam", "dashboard", project], folder, variables)


def said(finished: Finished) -> str:
    """The only sentence of a refusal."""
    assert finished.returncode == 1, finished.output
    assert "Traceback" not in finished.output
    return finished.after(f"lightning-adam dashboard: {PROJECT}: ")


def test_a_second_time_the_same_workspace_is_brought_up_to_date(tmp_path: Path) -> None:
    with WandbServer("project") as server:
        first = dashboard(tmp_path, server)
        assert first.returncode == 0, first.output
        (identifier,) = server.views
        view = server.views[identifier]
        assert first.lines == [f"workspace: {server.url}/{PROJECT}?nw=lightningadam"]
        assert (view.project, view.type, view.display_name) == ("project", "project-view", "Adam")
        as_first_saved = json.loads(view.spec)
        # Somebody filters the runs and throws the panels away.
        changed = json.loads(view.spec)
        changed["section"]["runSets"][0]["search"]["query"] = "baseline"
        changed["section"]["panelBankConfig"]["sections"] = []
        server.views[identifier] = dataclasses.replace(view, spec=json.dumps(changed))
        second = dashboard(tmp_path, server)
        assert second.output == first.output
        assert list(server.views) == [identifier]
        saved = json.loads(server.views[identifier].spec)
        assert saved["section"]["runSets"][0]["search"]["query"] == "baseline"
        assert titles(saved) == titles(as_first_saved)
        assert len(server.charts) == 1


def titles(spec: dict[str, Any]) -> list[tuple[str, list[str | None]]]:
    return [
        (section["name"], [panel["config"].get("chartTitle") for panel in section["panels"]])
        for section in spec["section"]["panelBankConfig"]["sections"]
    ]


@pytest.mark.slow
def test_the_curve_of_eps_is_drawn_as_the_run_itself_asks_for(tmp_path: Path) -> None:
    assert recipe(tmp_path, *BRIEFLY).returncode == 0
    (offline_run,) = offline_runs(tmp_path)
    name = "_wandb.visualize.adam_underflow/eps_curve"
    updates = [entry["config"]["update"] for entry in records(offline_run) if "config" in entry]
    asked = next(update[name] for update in updates if name in update)["panel_config"]
    printed = run([BIN / "lightning-adam", "dashboard", PROJECT, "--json"], tmp_path)
    panels = [
        panel["config"]
        for section in json.loads(printed.output)["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]
    (ours,) = [each for each in panels if each.get("panelDefId") == asked["panelDefId"]]
    assert ours["fieldSettings"] == asked["fieldSettings"]
    assert ours["transform"] == asked["transform"]
    assert ours["stringSettings"]["xname"] == asked["stringSettings"]["xname"]
    table = [{"name": "tableKey", "value": "adam_underflow/eps_curve_table"}]
    assert json.dumps(table) in json.dumps(asked["userQuery"])
    assert "adam_underflow/eps_curve_table" in json.dumps(ours["userQuery"])


def test_no_such_project(tmp_path: Path) -> None:
    with WandbServer("another") as server:
        assert "Train first with WandbLogger(project='project')" in said(
            dashboard(tmp_path, server)
        )


@pytest.mark.slow
@pytest.mark.parametrize("refusal", Refusal)
def test_no_permission(refusal: Refusal, tmp_path: Path) -> None:
    with WandbServer("project") as server:
        server.refusal = refusal
        assert "type wandb login as one who may write there" in said(dashboard(tmp_path, server))
        assert not server.views


@pytest.mark.slow
def test_nobody_is_logged_in(tmp_path: Path) -> None:
    with WandbServer("project") as server:
        told = dashboard(tmp_path, server, WANDB_API_KEY="", NETRC=str(tmp_path / "netrc"))
        assert said(told).endswith("type wandb login")


@pytest.mark.slow
def test_no_server(tmp_path: Path) -> None:
    """The client is patient for twenty seconds."""
    with WandbServer("project") as server:
        pass
    assert "W&B did not answer" in said(dashboard(tmp_path, server))
