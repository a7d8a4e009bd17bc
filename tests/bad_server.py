"""A server on loopback that cuts, lies, changes its mind and serves rubbish, and what it serves."""

import hashlib
import random
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

BODY = random.Random(1).randbytes(700_000)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges and ETags; `server.script[path]` says what to do wrong, one word a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.requests.append((path, self.headers.get("Range"), self.headers.get("If-Range")))
        wrong = server.script[path].pop(0) if server.script.get(path) else "nothing"
        body, version = server.files[path], server.versions.get(path, '"1"')
        if isinstance(wrong, int):
            return self.answer(wrong, b"no", 2)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if wrong != "ignore If-Range" and self.headers.get("If-Range") != version or wrong == "ignore Range":
            start = 0
        headers = {"ETag": version} if version else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        if wrong == "another range":
            headers["Content-Range"] = f"bytes {start + 7}-{len(body) - 1}/{len(body)}"
        if wrong == "corrupt":
            rest = rest[:-9] + b"corrupted"
        length = {"long": len(rest) + 1000, "short": len(rest) // 2}.get(wrong, len(rest))
        sent = len(rest) // 2 if wrong in ("cut", "no length") else min(length, len(rest))
        self.answer(206 if start else 200, rest[:sent], None if wrong == "no length" else length, headers)

    def answer(self, status, body, length, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)
        self.close_connection = length != len(body)


def serving(monkeypatch):
    """For `server = pytest.fixture(serving)`: the server, as long as a test lasts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that hangs up is what some tests are about
    server.files, server.script, server.versions, server.requests, server.sent = {"/a.csv": BODY}, {}, {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def md5(body):
    return "md5:" + hashlib.md5(body).hexdigest()


def zipped(entries):
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return out.getvalue()
