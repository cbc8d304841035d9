"""The part of the Hugging Face Hub that huggingface_hub 2.4 talks to, on loopback.

Two servers: the Hub (names, commits, small files) and its CDN on another port, to which large files are redirected. Every
request is logged. HTTP/1.0, so that no connection outlives a request and a stopped server is really gone.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".pt")


class Request(NamedTuple):
    server: str
    method: str
    path: str
    headers: dict


@dataclass
class Repo:
    """Commits (oldest first) of path -> content, and what the refs point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None

    def commit(self, files):
        before = self.commits.get(self.refs.get("main"), {})
        contents = {**before, **files}
        facts = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(contents.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), facts]).encode()).hexdigest()
        self.commits[sha] = contents
        self.refs["main"] = sha
        return sha


class HubServer:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.drops = 0  # CDN answers that break off in the middle
        self.shorts = 0  # CDN answers that claim to be complete but are half as long
        self.write_token: str | None = None
        self._hub = _serve(self, _Hub, "hub")
        self._cdn = _serve(self, _Cdn, "cdn")
        self.endpoint = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.cdn = f"http://127.0.0.1:{self._cdn.server_address[1]}"

    def repo(self, name, **options):
        return self.repos.setdefault(name, Repo(**options))

    def seen(self, server=None, method=None):
        return [r for r in self.log if server in (None, r.server) and method in (None, r.method)]

    def stop(self):
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()


def _serve(state, handler, name):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"state": state, "name": name}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    state: HubServer
    name: str

    def log_message(self, *args):
        pass

    def handle_one(self):
        if self.path == "/api/agent-harnesses":  # huggingface_hub asks this once a day, whatever it was told to do
            return self.answer(404)
        self.state.log.append(Request(self.name, self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.respond(unquote(self.path.split("?")[0]))

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def answer(self, status, data=b"", *, cut=False, **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def fail(self, status, code, message=""):
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)


class _Hub(_Handler):
    def respond(self, path):
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.describe(match[1], match[2] or "main")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.command == "POST":
            return self.write(path)
        return self.fail(404, "RepoNotFound")

    # -- reading

    def find(self, name, revision):
        repo = self.state.repos.get(name)
        sent = self.headers.get("Authorization", "")
        if repo is None or (repo.token is not None and sent != f"Bearer {repo.token}" and not repo.gated):
            return self.fail(401 if not sent else 404, "RepoNotFound")
        if repo.gated and sent != f"Bearer {repo.token}":
            return self.fail(403, "GatedRepo", f"Access to model {name} is restricted")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return self.fail(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def resolve(self, name, revision, file):
        if (found := self.find(name, revision)) is None:
            return None
        sha, files = found
        if file not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[file]
        if not file.endswith(LARGE):
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=sha)
        digest = hashlib.sha256(data).hexdigest()
        self.state.uploads[digest] = data
        return self.answer(
            302,
            Location=f"{self.state.cdn}/{digest}?signature=1",
            X_Repo_Commit=sha,
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=len(data),
        )

    def describe(self, name, revision):
        if (found := self.find(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self.answer(200, {"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": [], "private": False})

    # -- writing

    def write(self, path):
        if self.state.write_token is not None and self.headers.get("Authorization") != f"Bearer {self.state.write_token}":
            return self.fail(403, "Forbidden", "your token may not write here")
        if path == "/api/repos/create":
            wanted = json.loads(self.body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.state.repos:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"{self.state.endpoint}/{name}"}
                )
            self.state.repo(name)
            return self.answer(200, {"url": f"{self.state.endpoint}/{name}", "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self.answer(200, {"files": [self.upload_mode(file) for file in json.loads(self.body)["files"]]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.answer(
                200, {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(self.body)["objects"]]}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1])
        return self.fail(404, "RepoNotFound")

    def upload_mode(self, file):
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def upload(self, wanted):
        return {**wanted, "actions": {"upload": {"href": f"{self.state.cdn}/{wanted['oid']}"}}}

    def commit(self, name):
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.uploads[value["oid"]]
        sha = self.state.repos[name].commit(files)
        self.answer(200, {"success": True, "commitUrl": f"{self.state.endpoint}/{name}/commit/{sha}", "commitOid": sha})


class _Cdn(_Handler):
    def respond(self, path):
        digest = path.removeprefix("/")
        if self.command == "PUT":
            self.state.uploads[digest] = self.body
            return self.answer(200)
        if digest not in self.state.uploads:
            return self.answer(404)
        data = self.state.uploads[digest]
        if self.state.shorts:
            self.state.shorts -= 1
            return self.answer(200, data[: len(data) // 2])
        status, headers = 200, {}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            status, headers = 206, {"Content_Range": f"bytes {start}-{end}/{len(data)}"}
            data = data[start : end + 1]
        cut = self.state.drops > 0
        self.state.drops -= cut
        return self.answer(status, data, cut=cut, **headers)
