"""A store of S3's kind that keeps the conditions of reads, and ignores those of writes, as several real ones do."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import override


class CarelessStore:
    """Objects in memory, with no bucket and no signature looked at."""

    def __init__(self) -> None:
        objects: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self, status: int, body: bytes = b"", etag: str = "") -> None:
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(body)))
                if etag:
                    self.send_header("ETag", etag)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(0.05)  # as far away as a store is
                objects[self.path] = data
                self._answer(200, etag=_etag(data))

            def do_GET(self) -> None:
                found = objects.get(self.path)
                if found is None:
                    self._answer(404)
                elif self.headers.get("If-None-Match") in ("*", _etag(found)):
                    self._answer(304)
                elif self.headers.get("If-Match", _etag(found)) != _etag(found):
                    self._answer(412)
                else:
                    self._answer(200, found, _etag(found))

            def do_DELETE(self) -> None:
                objects.pop(self.path, None)
                self._answer(204)

            do_HEAD = do_GET

            @override
            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
