"""A proxy on the loopback that fails on demand, and that makes fake-gcs-server keep the conditions of writes."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, override
from urllib.parse import parse_qsl, quote, unquote, urlsplit

CHANGES = r"^(PUT|POST|DELETE)"
"""The requests that change something."""


def changes(url: str) -> str:
    """The requests that change something in a folder."""
    return f"{CHANGES}.*{url.rpartition('/')[2]}/"


Fault = Literal["answer", "lost", "cut", "reset", "hang", "kill", "kill_after", "stop"]
"""`answer` with `status` without asking the server; `lost`: done, then 503; `cut`: done, then the connection is reset;
`reset`: not done, reset; `hang`: no answer for `seconds`; `kill`, `kill_after`: SIGKILL to `pid` before, after it is
done; `stop`: SIGSTOP to `pid` before it is done."""


@dataclass
class Rule:
    """Which requests fail, and how."""

    do: Fault
    match: str = CHANGES
    """Of `METHOD path?query`, decoded."""
    after: int = 0
    """So many that match are let through first."""
    times: int = 1
    """So many fail."""
    status: int = 503
    body: bytes = b""
    pid: int | None = None
    seconds: float = 30.0
    seen: int = 0
    """How many have matched."""
    struck: int = 0
    """How many have failed."""


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class FaultProxy:
    """Forwards everything to one server, but for what its rules say."""

    def __init__(self, upstream_port: int, *, gcs_conditions: bool = False):
        self._upstream_port = upstream_port
        self._gcs_conditions = gcs_conditions
        self.keeps_conditions = True
        """False: as a store that ignores the conditions of writes."""
        self._mutex = threading.Lock()
        self._conditional = threading.Lock()
        self._rules: list[Rule] = []
        proxy = self

        class Handler(_Handler):
            @override
            def answer(self, body: bytes) -> Answer | None:
                return proxy._answer(self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def set_rules(self, *rules: Rule) -> None:
        """From now on these rules hold; none: all goes through."""
        with self._mutex:
            self._rules = list(rules)

    def add_rule(self, rule: Rule) -> Rule:
        """Adds a rule to those that hold."""
        with self._mutex:
            self._rules.append(rule)
        return rule

    def aim(self, rule: Rule, pid: int) -> None:
        """Adds a rule against a process."""
        rule.pid = pid
        self.add_rule(rule)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _struck(self, line: str) -> Rule | None:
        with self._mutex:
            for rule in self._rules:
                if re.search(rule.match, line):
                    rule.seen += 1
                    if rule.seen > rule.after and rule.struck < rule.times:
                        rule.struck += 1
                        return rule
        return None

    def _answer(self, request: "_Handler", body: bytes) -> Answer | None:
        rule = self._struck(f"{request.command} {unquote(request.path)}")
        match rule.do if rule else None:
            case "answer":
                assert rule
                return Answer(rule.status, rule.body)
            case "reset":
                return None
            case "hang":
                assert rule
                time.sleep(rule.seconds)
                return None
            case "kill":
                assert rule and rule.pid
                os.kill(rule.pid, signal.SIGKILL)
                return None
            case "stop":
                assert rule and rule.pid
                os.kill(rule.pid, signal.SIGSTOP)
            case _:
                pass
        answer = self._forward(request, body)
        match rule.do if rule else None:
            case "lost":
                return Answer(503)
            case "cut":
                return None
            case "kill_after":
                assert rule and rule.pid
                os.kill(rule.pid, signal.SIGKILL)
                return None
            case _:
                return answer

    def _forward(self, request: "_Handler", body: bytes) -> Answer:
        if not self._gcs_conditions or not self.keeps_conditions:
            ignored = () if self.keeps_conditions else ("if-match", "if-none-match")
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ignored}
            return self._upstream(request, request.command, request.path, body, headers)
        with self._conditional:
            status = self._refusal(request)
            if status is not None:
                return Answer(status)
            return self._upstream(request, request.command, request.path, body, dict(request.headers))

    def _refusal(self, request: "_Handler") -> int | None:
        """What a store that keeps conditions answers to one that does not hold."""
        url = urlsplit(request.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        if not query.keys() & {"ifGenerationMatch", "ifGenerationNotMatch"}:
            return None
        if "/upload/" in url.path and "name" not in query:
            return None  # multipart uploads: the server checks those itself
        place = re.search("/b/([^/?]+)/o", url.path)
        assert place
        key = query["name"] if "/upload/" in url.path else unquote(url.path.split("/o/", 1)[1])
        found = self._upstream(request, "GET", f"/storage/v1/b/{place[1]}/o/{quote(key, safe='')}", b"", {})
        now = str(json.loads(found.body)["generation"]) if found.status == 200 else "0"
        if query.get("ifGenerationMatch", now) != now:
            return 412
        if query.get("ifGenerationNotMatch") == now:
            return 304 if request.command == "GET" else 412
        return None

    def _upstream(self, request: "_Handler", command: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        connection = request.upstream
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._upstream_port, timeout=60)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request.upstream = connection
        sent = {k: v for k, v in headers.items() if k.lower() not in ("connection", "expect")}
        try:
            connection.request(command, path, body=body or None, headers=sent)
            answer = connection.getresponse()
            read = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            request.upstream = None
            return Answer(502)
        return Answer(answer.status, read, dict(answer.getheaders()))


class _Handler(BaseHTTPRequestHandler):
    """Reads a request whole, and writes an answer or cuts the connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    upstream: http.client.HTTPConnection | None = None
    """To the server; as long as the client's."""

    def answer(self, body: bytes) -> Answer | None:
        """Returns None to cut the connection."""
        raise NotImplementedError

    def _serve(self) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.answer(body)
        if answer is None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        with suppress(OSError):  # the client was killed
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(answer.body))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            self.wfile.flush()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    @override
    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    @override
    def finish(self) -> None:
        if self.upstream is not None:
            self.upstream.close()
        with suppress(OSError):
            super().finish()
