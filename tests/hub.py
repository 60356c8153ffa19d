"""A small hub on 127.0.0.1: the paths that huggingface_hub asks for (tree of a data set, files with
ranges), and faults on demand. What it serves lies in memory."""

import hashlib
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def zip_of(members, links=(), kind=zipfile.ZIP_STORED):
    """The bytes of a zip, of {name: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            info.external_attr = (0o120777 if name in links else 0o100644) << 16
            archive.writestr(info, content)
    return file.getvalue()


class Hub:
    """`files`: {"owner/name": {path: bytes}}. `asked`: [(path, range)] of the files' GETs.
    `cut[path]`: bytes after which the connection is cut, once, of a whole file, or of a long range
    at cut["part of PATH"]; `wrong` paths have a wrong byte in whole files; `gated` data sets answer
    403; `ill` paths answer 503, once."""

    def __init__(self, files):
        self.files, self.asked, self.cut, self.wrong, self.gated = files, [], {}, set(), set()
        self.ill = set()
        self.slow = None                        # an event: a GET of a whole file waits for it
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, code, body=b"", **headers):
                self.send_response(code)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/main", path):
                    return self.tree(found[1])
                found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", path)
                repo, name = found.groups() if found else ("raw", path.lstrip("/"))
                if repo in hub.gated:
                    return self.answer(403, X_Error_Code="GatedRepo",
                                       X_Error_Message="Access is restricted")
                if name in hub.ill:
                    hub.ill.remove(name)
                    return self.answer(503)
                if name not in hub.files.get(repo, {}):
                    return self.answer(404, X_Error_Code="EntryNotFound")
                self.file(name, hub.files[repo][name])

            def tree(self, repo):
                rows = []
                for path, content in hub.files[repo].items():
                    row = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    if path.endswith(".zip"):
                        oid = hashlib.sha256(content).hexdigest()
                        row["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                    rows.append(row)
                self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")

            def file(self, name, content):
                asked = self.headers.get("Range")
                hub.asked.append((name, asked))
                first, last = 0, len(content) - 1
                if asked:
                    start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                    first, last = int(start), min(last, int(end or last))
                body, headers = content[first:last + 1], {}
                if asked:
                    headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
                whole = not asked or asked.endswith("-")        # not a look at a zip's table
                if whole and name in hub.wrong:
                    body = body[:-1] + bytes([body[-1] ^ 1])
                cut = name if whole else f"part of {name}"
                n = hub.cut.pop(cut) if hub.cut.get(cut, len(body)) < len(body) else len(body)
                self.send_response(206 if asked else 200)
                for key, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body[:n])
                if whole and hub.slow:
                    self.wfile.flush()
                    hub.slow.wait(60)
                if n < len(body):
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def loads(self):
        """Files that were asked for whole, or from a byte on."""
        return [(name, asked) for name, asked in self.asked
                if not asked or asked.endswith("-")]
