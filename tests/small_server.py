"""A server of files on this machine, which can be told what goes wrong."""

import http.server
import threading
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `trouble` maps a file's name to what goes wrong with it; `requests` lists what was
    asked for."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.trouble, self.requests = folder, {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data/%20Electron/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/data/%20Electron/")
        self.server.requests.append(name)
        trouble = self.server.trouble.get(name)
        body = (self.server.folder / name).read_bytes()
        if isinstance(trouble, int):
            self.send_error(trouble)
            return
        self.send_response(200)
        if trouble == "html":
            body = b"<!DOCTYPE html>\n<html><body>Sign in to continue</body></html>"
        if isinstance(trouble, bytes):
            body = trouble
        if trouble != "ends early, length unknown":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if str(trouble).startswith("ends early") else body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(folder):
    """A running server of a folder's files."""
    with Server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
