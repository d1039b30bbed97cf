"""The few endpoints of the Hub that a push uses, on localhost: create, preupload, LFS batch, PUT, commit."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What the server holds, and how it shall fail: `fail[path part] = [status, ...]`, one for each request.

    Status 0 drops the connection without an answer, -1 never answers; bytes are sent as they are, with 200.
    """

    def __init__(self):
        self.repos: dict[str, bool] = {}  # id -> private
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.fail: dict[str, list[int | bytes]] = {}
        self.retry_after = "7"
        self.ended = threading.Event()
        self.requests: list[tuple[str, str, str]] = []  # method, path, authorization
        self.url = ""

    def called(self, part: str) -> int:
        return sum(part in path for _, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, content, status=200, headers=None):
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def fail(self, status):
        if isinstance(status, bytes):
            self.send_response(200 if status else 204)
            self.send_header("Content-Length", str(len(status)))
            self.end_headers()
            self.wfile.write(status)
            return None
        if status == -1:
            self.hub.ended.wait()
            status = 0
        if status == 0:
            self.close_connection = True
            return None
        retry = {"Retry-After": self.hub.retry_after} if status == 429 else {}
        return self.answer({"error": f"told to fail, {self.headers.get('Authorization')}"}, status, retry)

    def handle_one(self):
        body, path = self.body(), self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Authorization", "")))
        for part, statuses in self.hub.fail.items():
            if part in path and statuses:
                return self.fail(statuses.pop(0))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            private = asked.get("private") or asked.get("visibility") == "private"
            known = name in self.hub.repos
            self.hub.repos.setdefault(name, bool(private))
            return self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer({"files": [self.mode(each) for each in files]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]})
        if path.startswith("/store/"):
            self.hub.objects[hashlib.sha256(body).hexdigest()] = body
            return self.answer({})
        if "/commit/" in path:
            return self.commit(body)
        if path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            return self.answer({"id": name, "sha": "0" * 40, "siblings": [], "private": self.hub.repos.get(name)})
        return self.answer({"error": f"unknown {path}"}, 404)

    def mode(self, each):
        large = each["path"].endswith((".safetensors", ".onnx", ".data"))
        return {"path": each["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def place(self, each):
        if each["oid"] in self.hub.objects:
            return each
        return each | {"actions": {"upload": {"href": f"{self.hub.url}/store/{each['oid']}"}}}

    def commit(self, body):
        files = {}
        for line in body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits.append(files)
        url = f"{self.hub.url}/me/fast/commit/{'1' * 40}"
        return self.answer({"commitOid": "1" * 40, "commitUrl": url, "hookOutput": "", "success": True})

    do_GET = do_POST = do_PUT = handle_one


@contextmanager
def serving():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # else its end takes 0.5 s
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
