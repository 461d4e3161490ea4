"""A W&B server in this process: the file stream, GraphQL and uploads that wandb 0.31 speaks.

It keeps what it is told, and can refuse: with an HTTP status, by closing connections, or for some
of the paths only.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, ClassVar

HISTORY, CONFIG = "wandb-history.jsonl", "config"
UPLOAD = re.compile(r"/upload/([^/]+)/(.*)")
FILE_STREAM = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")


@dataclass
class StoredRun:
    """What the server has of a run: rows by their line, the configuration, alerts, files."""

    name: str
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """As W&B shows it: by `_step`, of which a later row with the same one takes the place."""
        rows = (json.loads(line) for _, line in sorted(self.lines.get(HISTORY, {}).items()))
        return [row for _, row in sorted({row["_step"]: row for row in rows}.items())]

    def rows(self) -> list[dict[str, Any]]:
        """The history without what W&B adds to it."""
        return [
            {name: value for name, value in row.items() if not name.startswith("_")}
            for row in self.history
        ]

    def values(self, name: str) -> Any:
        return self.config[name]["value"]


class WandbServer:
    """
    Attributes:
        refuse: given a path and a body, the status to answer with, 0 to close the connection, None
            to serve it.
        unknown: what was asked that it does not know; empty unless the client has changed.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.projects: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.unknown: list[str] = []
        self.operations: list[str] = []
        self.refuse: Callable[[str, bytes], int | None] = lambda path, body: None
        self.lock = Lock()
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator["WandbServer"]:
        thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def the_run(self) -> StoredRun:
        (run,) = self.runs.values()
        return run

    def run(self, name: str) -> StoredRun:
        return self.runs.setdefault(name, StoredRun(name))

    def take_stream(self, name: str, content: dict[str, Any]) -> None:
        run = self.run(name)
        for file, part in (content.get("files") or {}).items():
            for number, line in enumerate(part.get("content", ()), start=part.get("offset", 0)):
                run.lines.setdefault(file, {})[number] = line
        if content.get("complete"):
            run.exit_code = content.get("exitcode")

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        self.operations.append(operation)
        method = getattr(self, f"_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return None
        result: dict[str, Any] = method(asked)
        return result

    def _Viewer(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        user = {"id": "u", "entity": "lab", "username": "lab", "name": "lab", "email": "a@b.c"}
        more = {"admin": False, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": user | more}

    _GetDefaultEntity = _GetViewer = _Viewer

    def _ServerFeaturesQuery(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _ServerInfo(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        versions = {"max_cli_version": "99.0"}
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": None}}

    def _OrganizationCoreWeaveOrganizationID(  # noqa: N802
        self, asked: dict[str, Any]
    ) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _RunStoppedStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": {"stopped": False}}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = asked.get("name") or asked["id"]
        is_new, run = name not in self.runs, self.run(name)
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        bucket = self._bucket(run) | {"project": _project(asked), "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(asked.get("name") or asked.get("runName") or "")
        bucket = None
        if run:
            tail = [json.dumps(row) for row in run.history[-1:]]
            bucket = self._bucket(run) | {
                "summaryMetrics": tail[-1] if tail else "{}",
                "logLineCount": len(run.lines.get("output.log", {})),
                "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "tags": [],
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": _project(asked) | {"bucket": bucket}}

    def _bucket(self, run: StoredRun) -> dict[str, Any]:
        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.name,
            "description": "",
            "config": json.dumps(run.config),
            "historyLineCount": len(run.lines.get(HISTORY, {})),
        }

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = asked.get("run") or asked.get("runName")
        files = [
            {"name": file, "uploadUrl": f"{self.url}/upload/{name}/{file}"}
            for file in asked.get("files") or ()
        ]
        return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = asked["input"]["artifactCollectionName"]
        sequence = {"id": name, "name": name, "latestArtifact": None, "project": None}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        artifact = asked["artifactID"]
        manifest = {"id": artifact, "file": self._file_of(artifact, asked["name"])}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [
            {"node": self._file_of(file["artifactID"], file["name"])}
            for file in asked["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": files}}}

    def _file_of(self, artifact: str, name: str) -> dict[str, Any]:
        where = {"uploadUrl": f"{self.url}/upload/{artifact}/{name}", "uploadHeaders": []}
        more = dict.fromkeys(("storagePath", "uploadMultipartUrls"))
        return {"id": name, "name": name, "displayName": name, "artifact": {"id": artifact}} | (
            where | more
        )

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": ""}}}

    def _NotifyScriptableRunAlert(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.run(asked["runName"]).alerts.append((asked["title"], asked["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _Run(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(asked["name"])
        if run is None:
            return {"project": {"run": None}}
        more = {
            "projectId": 1,
            **dict.fromkeys(("sweepName", "group", "jobType", "commit", "notes")),
            "user": {"name": "lab", "username": "lab"},
            "tags": [],
            "state": "finished",
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "systemMetrics": "{}",
            "summaryMetrics": "{}",
            "historyKeys": self._keys(run),
        }
        return {"project": {"run": self._bucket(run) | more}}

    def _RunHistoryKeys(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": {"historyKeys": self._keys(self.runs[asked["name"]])}}}

    def _keys(self, run: StoredRun) -> dict[str, Any]:
        return {"lastStep": max((row["_step"] for row in run.history), default=-1)}

    def _RunParquetHistory(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _HistoryPage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        first, stop = asked["minStep"], asked["maxStep"]
        rows = [row for row in self.runs[asked["run"]].history if first <= row["_step"] < stop]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def _View(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if asked["projectName"] not in self.projects:
            return {"project": None}
        found = [
            {"id": key, "displayName": view["displayName"], "spec": view["spec"]}
            for key, view in self.views.items()
            if view["name"] == asked["viewName"]
        ]
        return {"project": {"allViews": {"edges": [{"node": node} for node in found]}}}

    def _UpsertView2(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        view = asked.get("id") or f"view-{len(self.views)}"
        is_new = view not in self.views
        self.views[view] = asked
        name = asked["name"]
        return {"upsertView": {"view": {"id": view, "name": name}, "inserted": is_new}}


def _project(asked: dict[str, Any]) -> dict[str, Any]:
    entity = {"id": "e", "name": asked.get("entity") or "lab"}
    return {"id": "p", "name": asked.get("project") or "farspan", "entity": entity}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed reset their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: ClassVar[WandbServer]

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        status = self.state.refuse(self.path, body)
        if status == 0:
            self.close_connection = True
            return
        with self.state.lock:
            self._send(*((status, {}) if status else self._answer(body)))

    def _answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        if stream := FILE_STREAM.match(self.path):
            self.state.take_stream(stream[1], json.loads(body))
            return 200, {"limits": {}}
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = asked.get("operationName") or (name[1] if name else asked["query"])
            return 200, {"data": self.state.answer(operation, asked.get("variables") or {})}
        if upload := UPLOAD.match(self.path):
            # Artifacts have files beside those of the run.
            if upload[1] in self.state.runs:
                self.state.run(upload[1]).files[upload[2]] = body
            return 200, {}
        self.state.unknown.append(f"{self.command} {self.path}")
        return 404, {}

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
