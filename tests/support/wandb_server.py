"""A local stand-in for a W&B server, which keeps data and can refuse requests or fail.

python -m tests.support.wandb_server --delay 2

prints its address. A line "unavailable" on its standard input makes it answer 503 from then on, any
other line ends that, and the end of the input ends the server.
"""

import argparse
import gzip
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from typing_extensions import Self

Json = dict[str, Any]

ENTITY = "somebody"
KEY = 40 * "0"
HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"
UNAVAILABLE = 503
NOT_FOUND = 404


@dataclass
class Run:
    """The received data of a run."""

    project: str
    config: Json = field(default_factory=dict)
    streamed: dict[str, dict[int, str]] = field(default_factory=dict)
    """The lines of each streamed file, by their number: one that is sent twice is kept once."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def rows(self) -> list[Json]:
        """The lines of its history, each once."""
        lines = self.streamed.get(HISTORY, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    @property
    def history(self) -> list[Json]:
        """Its rows by step.

        `wandb sync` appends all rows of a run to those that have arrived. W&B identifies a row by
        its step.
        """
        rows = {row["_step"]: row for row in self.rows}
        return [rows[step] for step in sorted(rows)]

    @property
    def summary(self) -> Json:
        lines = self.streamed.get(SUMMARY, {})
        summary: Json = json.loads(lines[max(lines)]) if lines else {}
        return summary


@dataclass
class View:
    project: str
    type: str
    name: str
    display_name: str
    spec: str


class Refusal(Enum):
    """A refusal: the HTTP status and the message."""

    UNKNOWN_KEY = 401, "user is not logged in"
    NO_PERMISSION = 403, "permission denied"
    NO_PERMISSION_IN_GRAPHQL = 200, "permission denied"


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class WandbServer:
    """Answers W&B's client, and keeps the data that it sends.

    Args:
        projects: The projects that exist from the start; a run creates its own.
        delay_s: How long each answer takes.

    Example:
        >>> with WandbServer() as server:
        ...     server.variables["WANDB_BASE_URL"] == server.url
        True
    """

    def __init__(self, *projects: str, delay_s: float = 0.0) -> None:
        self.projects = {*projects}
        self.delay_s = delay_s
        self.unavailable = False
        """Whether every request is answered 503."""
        self.refusal: Refusal | None = None
        """How operations are refused. `Viewer` is refused for an unknown key only."""
        self.runs: dict[str, Run] = {}
        self.views: dict[str, View] = {}
        self.charts: dict[str, str] = {}
        """The specs of custom charts, by entity and name."""
        self.alerts: list[Json] = []
        self.unknown: list[str] = []
        self.turned_away = 0
        """Requests that came while it was unavailable."""
        self._changed = threading.Condition()
        self._listener = Listener(self)
        self._thread = threading.Thread(target=self._listener.serve_forever, daemon=True)
        self._answers: dict[str, Callable[[Json], Json]] = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "ServerInfo": self._server_info,
            "ServerFeaturesQuery": self._server_features,
            "OrganizationCoreWeaveOrganizationID": self._organization,
            "RunResumeStatus": self._run_resume_status,
            "UpsertBucket": self._upsert_bucket,
            "CreateRunFiles": self._create_run_files,
            "Runs": self._runs,
            "View": self._view,
            "UpsertView2": self._upsert_view,
            "CreateCustomChart": self._create_custom_chart,
            "NotifyScriptableRunAlert": self._alert,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_port}"

    @property
    def variables(self) -> dict[str, str]:
        return variables(self.url)

    @property
    def run(self) -> Run:
        (run,) = self.runs.values()
        return run

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def wait_until(self, condition: Callable[[], bool], patience_s: float = 60.0) -> None:
        """Returns as soon as the condition holds after a request.

        Raises:
            TimeoutError: The condition does not hold in time.
        """
        with self._changed:
            if not self._changed.wait_for(condition, patience_s):
                raise TimeoutError(f"not within {patience_s} s")

    def respond(self, path: str, body: bytes) -> tuple[int, Json]:
        """Returns the status and the content of the answer to a request."""
        time.sleep(self.delay_s)
        with self._changed:
            try:
                if self.unavailable:
                    self.turned_away += 1
                    return UNAVAILABLE, {}
                return self._route(path, body)
            finally:
                self._changed.notify_all()

    def _route(self, path: str, body: bytes) -> tuple[int, Json]:
        _, kind, *names = map(unquote, path.split("/"))
        if kind == "graphql":
            return self._graphql(json.loads(body))
        if kind == "files":
            _, _, run, _ = names
            return 200, self._file_stream(self.runs[run], json.loads(body))
        if kind == "run_files":
            run, *file = names
            self.runs[run].files["/".join(file)] = body
            return 200, {}
        return NOT_FOUND, {}

    def _graphql(self, request: Json) -> tuple[int, Json]:
        named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name = named[1] if named else ""
        try:
            self._refuse(name)
            return 200, {"data": self._answers[name](request.get("variables") or {})}
        except RefusedError as refused:
            return refused.status, {"data": None, "errors": [{"message": str(refused)}]}

    def _refuse(self, name: str) -> None:
        if name not in self._answers:
            self.unknown.append(name)
            raise RefusedError(200, f"{name} is not known here")
        is_refused = name != "Viewer" or self.refusal is Refusal.UNKNOWN_KEY
        if self.refusal is not None and is_refused:
            raise RefusedError(*self.refusal.value)

    def _file_stream(self, run: Run, request: Json) -> Json:
        for name, chunk in (request.get("files") or {}).items():
            lines = run.streamed.setdefault(name, {})
            lines.update(enumerate(chunk["content"], start=chunk["offset"]))
        if request.get("complete"):
            run.exit_code = request["exitcode"]
        return {"exitcode": None, "limits": {}}

    def _viewer(self, _: Json) -> Json:
        viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}}

    def _alert(self, alert: Json) -> Json:
        self.alerts.append(alert)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _server_info(self, _: Json) -> Json:
        versions = {"cliVersionInfo": {"max_cli_version": "999"}, "latestLocalVersionInfo": None}
        return {"serverInfo": versions}

    def _server_features(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _organization(self, _: Json) -> Json:
        return {"entity": None}

    def _run_resume_status(self, asked: Json) -> Json:
        known = self.runs.get(asked["name"])
        bucket = None if known is None else self._bucket(asked["name"], known)
        return {"model": {"id": "project", "bucket": bucket}}

    def _upsert_bucket(self, asked: Json) -> Json:
        is_new = asked["name"] not in self.runs
        self.projects.add(asked["project"])
        run = self.runs.setdefault(asked["name"], Run(asked["project"]))
        if asked.get("config"):
            sent = json.loads(asked["config"])
            run.config.update({key: entry["value"] for key, entry in sent.items()})
        bucket = self._bucket(asked["name"], run)
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _bucket(self, name: str, run: Run) -> Json:
        wrapped = {key: {"value": value} for key, value in run.config.items()}
        counts = {
            f"{kind}LineCount": len(run.streamed.get(f"wandb-{kind}.jsonl", {}))
            for kind in ("history", "events")
        }
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "description": None,
            "sweepName": None,
            "config": json.dumps(wrapped),
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": "{}",
            "project": {
                "id": "project",
                "name": run.project,
                "entity": {"id": "entity", "name": ENTITY},
            },
            **counts,
        }

    def _runs(self, asked: Json) -> Json:
        """Returns the newest run, the only one that clients request."""
        if asked["project"] not in self.projects:
            return {"project": None}
        assert (asked["order"], asked["perPage"]) == ("-created_at", 1)
        runs = {name: run for name, run in self.runs.items() if run.project == asked["project"]}
        edges = [{"node": self._bucket(*each), "cursor": ""} for each in [*runs.items()][-1:]]
        page = {"hasNextPage": len(runs) > 1, "endCursor": ""}
        return {"project": {"runCount": len(runs), "runs": {"edges": edges, "pageInfo": page}}}

    def _create_run_files(self, asked: Json) -> Json:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/run_files/{asked['run']}/{name}"}
            for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _view(self, asked: Json) -> Json:
        project = asked["name"]
        if project not in self.projects:
            return {"project": None}
        asked_for = asked.get("viewName")
        edges = [
            {"node": self._node(identifier, view)}
            for identifier, view in self.views.items()
            if (view.project, view.type) == (project, asked.get("viewType", "runs"))
            and asked_for in (None, view.name)
        ]
        return {"project": {"allViews": {"edges": edges}}}

    def _upsert_view(self, asked: Json) -> Json:
        project, kind, name = asked["projectName"], asked["type"], asked["name"]
        if project not in self.projects:
            raise RefusedError(NOT_FOUND, f"project {project} not found")
        same = [
            identifier
            for identifier, view in self.views.items()
            if (view.project, view.type, view.name) == (project, kind, name)
        ]
        identifier = asked.get("id") or next(iter(same), f"view{len(self.views)}")
        known = self.views.get(identifier)
        if known is None and asked.get("id"):
            raise RefusedError(NOT_FOUND, f"view {identifier} not found")
        view = View(project, kind, name, asked["displayName"], asked["spec"])
        self.views[identifier] = view
        saved = {"view": self._node(identifier, view), "inserted": known is None}
        return {"upsertView": saved}

    def _create_custom_chart(self, asked: Json) -> Json:
        name = f"{asked['entity']}/{asked['chartName']}"
        if name in self.charts:
            raise RefusedError(200, f"chart {name} already exists")
        self.charts[name] = asked["spec"]
        return {"createCustomChart": {"chart": {"id": name}}}

    def _node(self, identifier: str, view: View) -> Json:
        return {
            "id": identifier,
            "name": view.name,
            "type": view.type,
            "displayName": view.display_name,
            "description": None,
            "spec": view.spec,
            "user": {"id": "viewer", "username": ENTITY, "name": ENTITY},
            "project": {"id": "project", "name": view.project, "entityName": ENTITY},
        }


class Listener(ThreadingHTTPServer):
    def __init__(self, wandb_server: WandbServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wandb_server = wandb_server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect, and shows any other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status, content = self.server.wandb_server.respond(self.path, body)
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_PUT(self) -> None:
        self.do_POST()

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *arguments: Any) -> None:
        """Logs nothing."""


def variables(url: str) -> dict[str, str]:
    """Returns the environment of a client of the server at that address."""
    return {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "online",
        "WANDB_ERROR_REPORTING": "false",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.wandb_server")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer takes")
    with WandbServer(delay_s=parser.parse_args().delay) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        for line in sys.stdin:
            server.unavailable = line.strip() == "unavailable"


if __name__ == "__main__":
    main()
