"""A small Hugging Face Hub on loopback, in memory, with faults on demand, for the requests of the real clients.

    server = HubServer()                       in this process; other processes find it through HF_ENDPOINT
    server.user("hf_token", "zamenhof")
    server.fault("PUT /lfs/", status=503, times=2, headers={"Retry-After": "0"})
    server.fault("PUT /lfs/", drop=True)       the connection is closed in the middle of the file
    server.fault(".", skip=3, empty=True)      the fourth request gets an empty answer, and has no effect
    server.files("model", "zamenhof/x")        {path: bytes} of the last commit

Large files are sent by Git LFS, as on the Hub without xet (HF_HUB_DISABLE_XET=1): hf_xet is a compiled client with its
own protocol, which this server does not support.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = {"models": "model", "datasets": "dataset"}
LFS_BYTES = 10_000  # larger files use LFS; this includes the weights of small test models


class HubServer:
    def __init__(self, port: int = 0, part_bytes: int = 50_000_000):
        self.part_bytes = part_bytes  # larger LFS files are sent in parts
        self.users: dict[str, dict] = {}  # by token: the answer to whoami
        self.repos: dict[tuple[str, str], dict] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[dict] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def user(self, token: str, name: str, role: str = "write", scoped: list | None = None, orgs: tuple = ()) -> None:
        access = {"displayName": "test", "role": role}
        if scoped is not None:
            access["fineGrained"] = {"global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": org, "roleInOrg": org_role} for org, org_role in orgs]
        auth = {"type": "access_token", "accessToken": access}
        self.users[token] = {"type": "user", "name": name, "orgs": orgs, "auth": auth}

    def fault(
        self,
        pattern: str,
        times: int = 1,
        status: int = 0,
        headers: dict | None = None,
        drop: bool | str = False,
        empty: bool = False,
        skip: int = 0,
    ):
        """Disturb the next `times` requests that match the pattern ("METHOD /path"), after the first `skip` of them.

        Args:
            status: HTTP status of the answer.
            headers: of the answer.
            drop: close the connection in the middle of the request's body, or in the middle of the answer if there is
                no body. "answer": do what is requested, then close it in the middle of the answer.
            empty: answer with status 200 and an empty body, and do nothing.
        """
        fault = {"status": status, "headers": headers, "drop": drop, "empty": empty}
        self.faults.append({"pattern": pattern, "times": times, "skip": skip, **fault})

    def files(self, kind: str, repo: str) -> dict[str, bytes]:
        return {path: self.content(entry) for path, entry in self.repos[kind, repo]["commits"][-1]["files"].items()}

    def commits(self, kind: str, repo: str) -> int:
        return len(self.repos[kind, repo]["commits"]) - 1

    def content(self, entry: dict) -> bytes:
        return self.lfs[entry["oid"]] if entry["lfs"] else entry["content"]

    def put(self, kind: str, repo: str, files: dict[str, bytes]) -> None:
        """Create a repository with files of somebody else."""
        self.create(kind, repo, False)
        self.commit(kind, repo, {path: _regular(content) for path, content in files.items()}, ())

    def create(self, kind: str, repo: str, private: bool) -> None:
        first = {"oid": hashlib.sha1(repo.encode()).hexdigest(), "files": {".gitattributes": _regular(b"")}}
        self.repos[kind, repo] = {"private": private, "commits": [first]}

    def commit(self, kind: str, repo: str, added: dict, deleted) -> str:
        commits = self.repos[kind, repo]["commits"]
        files = {path: entry for path, entry in commits[-1]["files"].items() if path not in deleted} | added
        listing = json.dumps({path: entry["oid"] for path, entry in files.items()}) + commits[-1]["oid"]
        commits.append({"oid": hashlib.sha1(listing.encode()).hexdigest(), "files": files})
        return commits[-1]["oid"]


def _regular(content: bytes) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"lfs": False, "oid": oid, "size": len(content), "content": content}


def _tree_entry(path: str, entry: dict) -> dict:
    found = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["lfs"]:
        found["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the second part of every answer waits 40 ms for an acknowledgement
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # ---------------------------------------------------------------------------------------------------- plumbing

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f["times"] and re.search(f["pattern"], request)), None)
            if fault and fault["skip"]:
                fault["skip"] -= 1
                fault = None
            if fault:
                fault["times"] -= 1
        self.dropping = fault["drop"] if fault else False
        if self.dropping is True and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.hang_up()
            return
        self.body = self.read_body()
        if not path.startswith("/lfs/"):
            self.hub.bodies.append(self.body)
        if fault and fault["status"]:
            self.reply(fault["status"], {"error": "injected"}, fault["headers"])
            return
        if fault and fault["empty"]:
            self.reply(200, b"")
            return
        for pattern, method in self.ROUTES:
            if match := re.fullmatch(pattern, request):
                method(self, **match.groupdict())
                return
        self.reply(404, {"error": "no such page"}, {"X-Error-Code": "EntryNotFound"})

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, value, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.dropping:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.hang_up()
        else:
            self.wfile.write(body)

    @property
    def me(self) -> dict | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, repo: str) -> bool:
        """Whether the token may write there; if not, it has been answered with status 401 or 403."""
        if self.me is None:
            self.reply(401, {"error": "Invalid username or password."})
            return False
        orgs = [org["name"] for org in self.me["orgs"] if org["roleInOrg"] != "read"]
        if repo.split("/")[0] not in (self.me["name"], *orgs) or self.me["auth"]["accessToken"]["role"] == "read":
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            return False
        return True

    def found(self, kind: str, repo: str, revision: str = "main") -> dict | None:
        """The commit; None if it does not exist, which has been answered already."""
        entry = self.hub.repos.get((KINDS[kind], repo))
        if entry is None or (entry["private"] and self.me is None):
            self.reply(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commits = entry["commits"]
        commit = commits[-1] if revision == "main" else next((c for c in commits if c["oid"] == revision), None)
        if commit is None:
            self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # ------------------------------------------------------------------------------------------------------ answers

    def whoami(self) -> None:
        if self.me is None:
            self.reply(401, {"error": "Invalid username or password."})
        else:
            self.reply(200, self.me)

    def create(self) -> None:
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        repo = f"{asked.get('organization') or self.me['name']}/{asked['name']}"
        if not self.may_write(repo):
            return
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if (kind, repo) in self.hub.repos:
            self.reply(409, {"error": "You already created this repo", "url": url})
            return
        self.hub.create(kind, repo, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(200, {"url": url, "name": repo, "id": repo})

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        if (commit := self.found(kind, repo, revision)) is None:
            return
        readme = commit["files"].get("README.md")
        card = None
        if readme and (match := re.match(rb"---\n(.*?)\n---\n", self.hub.content(readme), re.DOTALL)):
            card = yaml.safe_load(match[1])
        answer = {"_id": "1", "id": repo, "sha": commit["oid"], "private": self.hub.repos[KINDS[kind], repo]["private"]}
        siblings = [{"rfilename": path} for path in commit["files"]]
        tags = (card or {}).get("tags", [])
        more = {"siblings": siblings, "tags": tags, "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        self.reply(200, {**answer, **more, **({"cardData": card} if card else {})})

    def refs(self, kind: str, repo: str) -> None:
        if commit := self.found(kind, repo):
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit["oid"]}
            self.reply(200, {"branches": [main], "converts": [], "tags": []})

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        if (commit := self.found(kind, repo, revision)) is None:
            return
        prefix = f"{folder}/" if folder else ""
        below = {path: entry for path, entry in commit["files"].items() if path.startswith(prefix)}
        if prefix and not below:
            self.reply(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, entry in below.items():
            inner = path.removeprefix(prefix)
            if "/" in inner:
                folders.add(prefix + inner.split("/")[0])
            if recursive or "/" not in inner:
                entries.append(_tree_entry(path, entry))
        directories = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self.reply(200, directories + entries)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        if (commit := self.found(kind, repo, revision)) is None:
            return
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        answer = []
        for path in paths:
            if path in commit["files"]:
                answer.append(_tree_entry(path, commit["files"][path]))
            elif any(name.startswith(path + "/") for name in commit["files"]):
                answer.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.reply(200, answer)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            good = bool(match) and isinstance(yaml.safe_load(match[1]), dict)
        except yaml.YAMLError:
            good = False
        errors = [] if good else [{"message": "invalid YAML"}]
        self.reply(200 if good else 400, {"errors": errors, "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write(repo) or (commit := self.found(kind, repo, revision)) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                "shouldIgnore": False,
                **({"oid": commit["files"][file["path"]]["oid"]} if file["path"] in commit["files"] else {}),
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def batch(self, repo: str) -> None:
        if not self.may_write(repo):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > self.hub.part_bytes:
                    count = -(-size // self.hub.part_bytes)
                    parts = {f"{i:05d}": f"{self.hub.url}/lfs/{oid}/part/{i}" for i in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/lfs/{oid}/whole",
                        "header": {"chunk_size": str(self.hub.part_bytes), **parts},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        self.reply(200, {"transfer": "multipart", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "wrong hash"})
            return
        self.hub.lfs[oid] = self.body
        self.reply(200, {})

    def store_part(self, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self.reply(200, {}, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def store_whole(self, oid: str) -> None:
        self.body = b"".join(content for _, content in sorted(self.hub.parts.pop(oid, {}).items()))
        self.store(oid)

    def verify(self, oid: str) -> None:
        self.reply(200 if oid in self.hub.lfs else 404, {})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        if not self.may_write(repo) or self.found(kind, repo, revision) is None:
            return
        added, deleted = {}, set()
        for line in self.body.splitlines():
            operation, value = json.loads(line)["key"], json.loads(line)["value"]
            if operation == "file":
                added[value["path"]] = _regular(base64.b64decode(value["content"]))
            elif operation == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self.reply(400, {"error": "an LFS file of the commit was never uploaded"})
                    return
                added[value["path"]] = {"lfs": True, "oid": value["oid"], "size": value["size"]}
            elif operation == "deletedFile":
                deleted.add(value["path"])
        oid = self.hub.commit(KINDS[kind], repo, added, deleted)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        if (commit := self.found(kind or "models", repo, revision)) is None:
            return
        if path not in commit["files"]:
            self.reply(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["oid"]}
            )
            return
        entry = commit["files"][path]
        content = self.hub.content(entry)
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-ETag": f'"{entry["oid"]}"', "X-Linked-Size": str(entry["size"])}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or entry["size"] - 1), entry["size"] - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{entry['size']}"
            self.reply(206, content[start : end + 1], headers)
        else:
            self.reply(200, content, headers)

    _API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    ROUTES = (
        (r"GET /api/whoami-v2", whoami),
        (r"POST /api/repos/create", create),
        (r"POST /api/validate-yaml", validate_yaml),
        (rf"GET {_API}", info),
        (rf"GET {_API}/revision/(?P<revision>[^/]+)", info),
        (rf"GET {_API}/refs", refs),
        (rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
        (rf"POST {_API}/paths-info/(?P<revision>[^/]+)", paths_info),
        (rf"POST {_API}/preupload/(?P<revision>[^/]+)", preupload),
        (rf"POST {_API}/commit/(?P<revision>[^/]+)", commit),
        (r"POST /(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (r"PUT /lfs/(?P<oid>\w+)", store),
        (r"PUT /lfs/(?P<oid>\w+)/part/(?P<part>\d+)", store_part),
        (r"POST /lfs/(?P<oid>\w+)/whole", store_whole),
        (r"POST /lfs/(?P<oid>\w+)/verify", verify),
        (
            r"(?:GET|HEAD) /(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            resolve,
        ),
    )
