"""A loopback server that speaks as much of Cloud Storage's JSON API as a run needs.

Whole objects only: no append, no compose, no copy, no rename (501). Objects live in
memory.
"""

import contextlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator


class Store(http.server.ThreadingHTTPServer):
    """`objects` maps a name, without its bucket, to (generation, bytes)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.refused: list[str] = []  # requests that were answered with 501
        self.uploads: dict[str, str] = {}
        self.generations = itertools.count(1)
        self.is_read_only = False  # answers writes with 403
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """Nothing: clients hang up when they have read enough."""


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    with Store() as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        try:
            yield store
        finally:
            store.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: without it 40 ms a request
    server: Store

    def log_message(self, *_):
        pass

    def _handle(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self._reply(*self._answer(self.command, self.path, self.headers, body))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _reply(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, method, target, headers, body):
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        path = url.path
        if path.startswith("/batch/"):
            return self._batch(headers, body)
        found = re.fullmatch(
            r"(/upload|/download|/resumable)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", path
        )
        if not found:
            return self._refuse(method, target)
        kind, bucket, is_object, quoted = found.groups()
        name = urllib.parse.unquote(quoted or "")
        with self.server.lock:
            if not is_object:
                return _json({"kind": "storage#bucket", "name": bucket, "id": bucket})
            if kind == "/upload" or kind == "/resumable":
                return self._upload(bucket, query, headers, body)
            if re.search(r"/(rewriteTo|copyTo|moveTo|compose)(/|$)", quoted or ""):
                return self._refuse(method, target)
            if method == "DELETE":
                return (204 if self.server.objects.pop(name, None) else 404), {}, b""
            if method == "GET":
                return self._get(bucket, name, query, headers)
        return self._refuse(method, target)

    def _refuse(self, method, target):
        self.server.refused.append(f"{method} {target}")
        return 501, {}, b"not supported"

    def _get(self, bucket, name, query, headers):
        if not name:
            return self._list(bucket, query)
        if name not in self.server.objects:
            return 404, {}, b'{"error": {"code": 404, "message": "Not Found"}}'
        generation, data = self.server.objects[name]
        if not _matches(query, generation):
            return 412, {}, b""
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        if query.get("alt") != "media":
            return _json(_describe(bucket, name, generation, data))
        extra = {"x-goog-generation": str(generation), "ETag": str(generation)}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
        if not found:
            return 200, extra, data
        first, last = found.groups()
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return 416, {}, b""
        extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, extra, data[start:stop]

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for name, (generation, data) in sorted(self.server.objects.items()):
            if not name.startswith(prefix) or name < first or (last and name >= last):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(_describe(bucket, name, generation, data))
        return _json({"items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket, query, headers, body):
        upload = query.get("upload_id")
        name = query.get("name")
        kind = query.get("uploadType")
        if self.server.is_read_only:
            return 403, {}, b"read only"
        if upload:  # the data of a resumable upload, in one piece
            name = self.server.uploads[upload]
            if not re.match(
                r"bytes (0-|\*/0)", headers.get("Content-Range", "bytes 0-")
            ):
                return self._refuse("PUT in pieces", name)
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = name
            path = f"/resumable/storage/v1/b/{bucket}/o?upload_id={upload}"
            return 200, {"Location": self.server.url + path}, b""
        elif kind == "multipart":
            meta, body = _split_parts(headers, body)
            name = name or json.loads(meta)["name"]
        old, _ = self.server.objects.get(name, (0, b""))
        if not _matches(query, old):
            return 412, {}, b""
        generation = next(self.server.generations)
        self.server.objects[name] = generation, body
        return _json(_describe(bucket, name, generation, body))

    def _batch(self, headers, body):
        answers = []
        for part in _split_parts(headers, body):
            line, *rest = part.decode().strip().splitlines()
            method, target, _ = line.split()
            status, _, text = self._answer(method, target, {}, b"")
            answers.append(f"HTTP/1.1 {status} x\r\n\r\n{text.decode()}\r\n")
        mark = "batch_answer"
        lines = [
            f"--{mark}\r\nContent-Type: application/http\r\n\r\n{a}" for a in answers
        ]
        content = {"Content-Type": f"multipart/mixed; boundary={mark}"}
        return 200, content, ("".join(lines) + f"--{mark}--\r\n").encode()


def _matches(query, generation):
    return query.get("ifGenerationMatch", str(generation)) == str(generation)


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _describe(bucket, name, generation, data):
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "id": f"{bucket}/{name}/{generation}",
        "size": str(len(data)),
        "generation": str(generation),
        "metageneration": "1",
        "etag": str(generation),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


def _split_parts(headers, body):
    """Contents of the parts of a multipart body, whichever its line ends."""
    boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
    end = b"\r\n" if b"\r\n" in body else b"\n"
    parts = body.split(b"--" + boundary)[1:-1]
    return [part.split(2 * end, 1)[1].removesuffix(end) for part in parts]
