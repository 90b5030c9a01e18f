"""A double of the Hugging Face Hub on loopback: repositories with branches, LFS, commits, downloads, private repositories.

    double = HubDouble()
    double.start()
    double.drop_at = "commit"     # the connection is cut at each request of that kind
    double.log                    # kinds of the requests so far

Only what huggingface_hub asks for is there; anything else is answered with 404. Large files go by classic LFS, so clients need
`HF_HUB_DISABLE_XET=1`. `environment` is what a process needs to talk to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "tester", "hf_double"
# Kind of request, method, path. The first that fits counts.
ROUTES = [
    (kind, method, re.compile(path))
    for kind, method, path in (
        ("whoami", "GET", r"/api/whoami-v2"),
        ("create", "POST", r"/api/repos/create"),
        ("validate", "POST", r"/api/validate-yaml"),
        ("branch", "POST", r"/api/(\w+)s/([^/]+/[^/]+)/branch/(.+)"),
        ("preupload", "POST", r"/api/(\w+)s/([^/]+/[^/]+)/preupload/([^/]+)"),
        ("commit", "POST", r"/api/(\w+)s/([^/]+/[^/]+)/commit/([^/]+)"),
        ("paths", "POST", r"/api/(\w+)s/([^/]+/[^/]+)/paths-info/([^/]+)"),
        ("lfs batch", "POST", r"/(?:(\w+)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
        ("lfs upload", "PUT", r"/lfs/([0-9a-f]{64})"),
        ("tree", "GET", r"/api/(\w+)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?"),
        ("refs", "GET", r"/api/(\w+)s/([^/]+/[^/]+)/refs"),
        ("info", "GET", r"/api/(\w+)s/([^/]+/[^/]+)(?:/revision/([^/]+))?"),
        ("file", "GET", r"/(?:(\w+)s/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)"),
    )
]


def digest(content: bytes) -> str:
    """The name that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits are whole trees, path to content; a branch is the name of a commit."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Puts a tree on a branch and gives its name."""
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str | None) -> str | None:
        """The commit of a branch, or the commit itself."""
        revision = unquote(revision or "main")
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubDouble:
    """The server; see the module."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.drop_at: str | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.double = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self) -> None:
        """Serves in a thread."""
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: str, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a process that takes this for the Hub."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return names | {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.sha(revision)]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing on stderr."""

    def answer(self):
        """Finds what is asked for and answers it."""
        self.double: HubDouble = self.server.double
        self.content = self.read_body()
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for kind, of, pattern in ROUTES:
            if of == method and (match := pattern.fullmatch(path)):
                self.double.log.append(kind)
                if self.double.drop_at == kind:
                    self.close_connection = True
                    return
                getattr(self, "on_" + kind.replace(" ", "_"))(*match.groups())
                return
        self.refuse(404, "", f"{path} is not doubled")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        """The whole body, also one that comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, body, status: int = 200, **headers: str) -> None:
        """Sends bytes, or anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Sends an error as the Hub does."""
        self.send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    @property
    def trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, kind: str | None, name: str) -> Repository | None:
        """The repository, or `None` after an answer that there is none."""
        found = self.double.repositories.get((kind or "model", name))
        if found is None or (found.private and not self.trusted):
            self.refuse(404 if self.trusted else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def tree(self, kind: str | None, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision, or `None` after an answer that there is none."""
        if (repository := self.repository(kind, name)) is None:
            return None
        if (sha := repository.sha(revision)) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repository.commits[sha]

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
        if path.endswith((".safetensors", ".parquet")):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def on_whoami(self):
        if not self.trusted:
            return self.refuse(401, "", "Invalid token")
        access = {"accessToken": {"displayName": "double", "role": "write"}}
        return self.send({"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def on_validate(self):
        self.send({"errors": [], "warnings": []})

    def on_create(self):
        if not self.trusted:
            return self.refuse(401, "", "Invalid username or password.")
        asked = json.loads(self.content)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.double.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.double.repositories:
            return self.send({"error": "You already created this repo", "url": url}, 409)
        made = Repository(private=bool(asked.get("private") or asked.get("visibility") == "private"))
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.double.repositories[kind, name] = made
        return self.send({"url": url, "name": name, "id": name})

    def on_branch(self, kind, name, branch):
        if (repository := self.repository(kind, name)) is None:
            return None
        branch = unquote(branch)
        if branch in repository.branches:
            return self.refuse(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return self.send({})

    def on_preupload(self, kind, name, revision):
        if (found := self.tree(kind, name, revision)) is None:
            return None
        answers = []
        for asked in json.loads(self.content)["files"]:
            large = asked["path"].endswith((".safetensors", ".parquet"))
            answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if asked["path"] in found[1]:
                answer["oid"] = digest(found[1][asked["path"]])
            answers.append(answer)
        return self.send({"files": answers})

    def on_lfs_batch(self, kind, name):
        objects = []
        for asked in json.loads(self.content)["objects"]:
            upload = {"upload": {"href": f"{self.double.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append({**asked, **({} if asked["oid"] in self.double.blobs else {"actions": upload})})
        self.send({"transfer": "basic", "objects": objects})

    def on_lfs_upload(self, oid):
        if hashlib.sha256(self.content).hexdigest() != oid:
            return self.refuse(422, "", "sha mismatch")
        self.double.blobs[oid] = self.content
        return self.send(b"")

    def on_commit(self, kind, name, branch):
        if not self.trusted:
            return self.refuse(401, "", "Invalid username or password.")
        if (found := self.tree(kind, name, branch)) is None:
            return None
        files, message = dict(found[1]), ""
        for line in self.content.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                message = value.get("summary", "")
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.double.blobs[value["oid"]]
            elif step["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.repository(kind, name).commit(unquote(branch), files, message)
        return self.send({"success": True, "commitUrl": f"{self.double.url}/{name}/commit/{sha}", "commitOid": sha})

    def on_paths(self, kind, name, revision):
        if (found := self.tree(kind, name, revision)) is not None:
            raw = self.content.decode()
            paths = json.loads(raw)["paths"] if raw.startswith("{") else parse_qs(raw).get("paths", [])
            self.send([self.entry(path, found[1][path]) for path in paths if path in found[1]])

    def on_tree(self, kind, name, revision, folder):
        if (found := self.tree(kind, name, revision)) is None:
            return None
        start = f"{unquote(folder).strip('/')}/" if folder else ""
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("1", "true")
        files = {path: content for path, content in sorted(found[1].items()) if path.startswith(start)}
        if start and not files:
            return self.refuse(404, "EntryNotFound", "no such path")
        here = {path: content for path, content in files.items() if recursive or "/" not in path[len(start) :]}
        folders = sorted({start + path[len(start) :].split("/")[0] for path in files if path not in here})
        listed = [self.entry(*one) for one in here.items()]
        return self.send(listed + [{"type": "directory", "path": one, "size": 0, "oid": "0"} for one in folders])

    def on_refs(self, kind, name):
        if (repository := self.repository(kind, name)) is not None:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repository.branches.items()
            ]
            self.send({"branches": branches, "converts": [], "tags": []})

    def on_info(self, kind, name, revision):
        if (found := self.tree(kind, name, revision)) is not None:
            sha, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {"_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha, "tags": []}
            dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
            state = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            self.send({**facts, **dates, **state, "siblings": siblings})

    def on_file(self, kind, name, revision, path):
        if (found := self.tree(kind, name, revision)) is None:
            return None
        sha, files = found
        if (content := files.get(unquote(path))) is None:
            return self.send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{digest(content)}"', "Content_Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            part = f"bytes {first}-{last}/{len(content)}"
            return self.send(content[first : last + 1], 206, Content_Range=part, **headers)
        return self.send(content, **headers)
