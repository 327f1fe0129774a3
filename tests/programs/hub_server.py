"""A Hub on this machine, with the routes that the client of huggingface_hub uses to create, upload, list and download.

Everything is in memory, and nothing outside the machine is reached.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# The kinds of repositories: their names in addresses, and their names in the client.
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
# Files of at least this size in bytes are uploaded apart from the commit, as with Git LFS.
_MIN_LFS_SIZE = 10_000


class LoopbackHub:
    """A server with repositories in memory.

    Attributes:
        url: the address of the server, for `HF_ENDPOINT`.
        repositories: `{(kind, name): {"private": bool, "commits": [(sha, {path: bytes})]}}`, the newest commit last.
        blobs: the contents of uploaded large files, `{SHA-256: bytes}`.
        forbidden: names of repositories that nobody may write to.
        gated: names of repositories whose owners have not agreed yet.
        fail_commits: number of commits that the server still answers with an error of the gateway.
        always_public: makes every new repository public, whatever is asked for.
    """

    def __init__(self):
        self.repositories, self.blobs, self.forbidden, self.fail_commits = {}, {}, set(), 0
        self.gated = set()
        self.always_public = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, kind, name):
        """Returns the files of the newest commit, `{path: bytes}`."""
        return self.repositories[kind, name]["commits"][-1][1]


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of the client; the attribute `hub` is the server's [`LoopbackHub`]."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, content=b"", headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message):
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _repository(self, kind, name):
        found = self.hub.repositories.get((kind, name))
        if found is None or (found["private"] and not self.headers.get("Authorization")):
            # The Hub does not say whether a private repository exists.
            self._refuse(404 if found is None else 401, "RepoNotFound", f"Repository {name} not found")
            return None
        if name in self.hub.gated:
            self._refuse(403, "GatedRepo", f"Access to {name} is restricted and you are not in the authorized list")
            return None
        return found

    def _commit_of(self, repository, revision):
        for sha, files in reversed(repository["commits"]):
            if revision in ("main", sha):
                return sha, files
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None, None

    # -- Writing

    def do_POST(self):
        body, path = self._body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(\w+)/(.+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] >= _MIN_LFS_SIZE else "regular",
                 "shouldIgnore": False, "oid": None}
                for file in files
            ]  # fmt: skip
            return self._send(200, {"files": modes})
        if match := re.fullmatch(r"/(?:(?:datasets|spaces)/)?(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": entry["oid"], "size": entry["size"]}
                | ({} if entry["oid"] in self.hub.blobs else
                   {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}})
                for entry in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._send(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/(\w+)/(.+)/commit/(.+)", path):
            return self._commit(_KINDS[match[1]], match[2], body)
        return self._refuse(404, "NotFound", f"no such route: {path}")

    def _create(self, request):
        kind = request.get("type") or "model"
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.hub.forbidden:
            return self._refuse(403, "Forbidden", f"You don't have the rights to create {name}")
        if (kind, name) in self.hub.repositories:
            return self._send(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
        files = {".gitattributes": b""}
        private = bool(request.get("private")) or request.get("visibility") == "private"
        private = private and not self.hub.always_public
        self.hub.repositories[kind, name] = {"private": private, "commits": [("0" * 40, files)]}
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[kind]
        return self._send(200, {"url": f"{self.hub.url}/{prefix}{name}", "name": name})

    def do_PUT(self):
        body = self._body()
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "the content does not have the SHA-256 of its name"})
        self.hub.blobs[oid] = body
        return self._send(200)

    def _commit(self, kind, name, body):
        repository = self._repository(kind, name)
        if repository is None:
            return None
        if self.hub.fail_commits:
            self.hub.fail_commits -= 1
            return self._send(500, {"error": "the gateway broke"})
        files = dict(repository["commits"][-1][1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        sha = hashlib.sha1(body + str(len(repository["commits"])).encode()).hexdigest()
        repository["commits"].append((sha, files))
        return self._send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # -- Reading

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            return self._send(200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(_KINDS[match[1] or "models"], match[2], match[3], match[4])
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._describe(_KINDS[match[1]], match[2], match[3] or "main")
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            return self._list(_KINDS[match[1]], match[2], match[3], match[4] or "")
        return self._refuse(404, "EntryNotFound", f"no such route: {path}")

    def _resolve(self, kind, name, revision, path):
        repository = self._repository(kind, name)
        sha, files = (None, None) if repository is None else self._commit_of(repository, revision)
        if files is None:
            return None
        if path not in files:
            self.send_response(404)
            for header, value in {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha, "Content-Length": "0"}.items():
                self.send_header(header, value)
            return self.end_headers()
        content = files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), int(part[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        return self._send(200, content, headers)

    def _describe(self, kind, name, revision):
        repository = self._repository(kind, name)
        sha, files = (None, None) if repository is None else self._commit_of(repository, revision)
        if files is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(files)]
        content = {"id": name, "sha": sha, "private": repository["private"], "siblings": siblings, "tags": []}
        return self._send(200, content | {"downloads": 0, "likes": 0})

    def _list(self, kind, name, revision, folder):
        repository = self._repository(kind, name)
        _, files = (None, None) if repository is None else self._commit_of(repository, revision)
        if files is None:
            return None
        recursive = "recursive=true" in self.path.lower()
        entries, folders = [], set()
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        for path, content in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                oid = hashlib.sha1(content).hexdigest()
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        if prefix and not entries:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        return self._send(200, entries)
