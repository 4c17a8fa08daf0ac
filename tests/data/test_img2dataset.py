"""img2dataset itself, against a server that loses, stalls and cuts: every id ends up somewhere, by cause.

It needs an environment of its own (`python -m venv E && E/bin/pip install img2dataset`): the test runs if
VLP_IMG2DATASET names its command, or one is on the PATH.
"""

import collections
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest

from helpers import formats
from vlp.data import records
from vlp.data.sources import fields, img2dataset
from vlp.data.tools import convert

COMMAND = os.environ.get("VLP_IMG2DATASET") or shutil.which("img2dataset")
STALL_SECS = 4
CAUSES = {  # kind of URL → what img2dataset says of it
    "ok": "success",
    "gone": "HTTP Error 404",
    "broken": "HTTP Error 500",
    "stalls": "timed out",
    "cut": "IncompleteRead(n bytes read, m more expected)",
    "html": "Image decoding error",
    "empty": "OpenCV(",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        _, kind, number = self.path.split("/")
        status = {"gone": 404, "broken": 500}.get(kind, 200)
        body = {"html": b"<html>not found</html>", "empty": b""}.get(kind)
        body = formats.jpeg(int(number), (64, 48)) if body is None else body
        if kind == "stalls":
            time.sleep(STALL_SECS)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        except OSError:
            pass  # the client has left

    def log_message(self, format, *args):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(not COMMAND, reason="no img2dataset: set VLP_IMG2DATASET to its command")
def test_every_id_is_accounted_for_by_cause(tmp_path, address, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    kinds = [k for i in range(5) for k in (*CAUSES, *["ok"] * 5)]
    rows = [
        {"url": f"{address}/{kind}/{i}", "caption": f"picture no {i}", "mine": f"own-{i:03d}"}
        for i, kind in enumerate(kinds)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "urls.parquet")
    flags = {
        "url_list": tmp_path / "urls.parquet", "input_format": "parquet", "url_col": "url",
        "caption_col": "caption", "save_additional_columns": '["mine"]', "output_format": "webdataset",
        "output_folder": tmp_path / "shards", "number_sample_per_shard": 17, "processes_count": 1,
        "thread_count": 16, "timeout": STALL_SECS / 2, "retries": 0, "resize_mode": "no",
        "disallowed_header_directives": "[]", "enable_wandb": "False",
    }  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    done = subprocess.run(
        [COMMAND, *(f"--{k}={v}" for k, v in flags.items())],
        capture_output=True,
        text=True,
        check=False,
        env=env | {"NO_ALBUMENTATIONS_UPDATE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    given = fields.Fields(key="mine", captions=("caption",))
    job = convert.Job(str(tmp_path / "shards"), str(tmp_path / "out"), given=given)
    manifest = convert.run(job)
    listed = (tmp_path / "out" / convert.LEFT_OUT).read_text().splitlines()
    reasons = {r["key"]: r["reason"] for r in map(json.loads, listed)}
    source = records.open_split(tmp_path / "out", "train")
    texts = {(r := source[i])["key"]: r["captions"][0]["text"] for i in range(len(source))}
    for i, kind in enumerate(kinds):
        key = f"own-{i:03d}"
        assert (key in texts) == (kind == "ok") and (key in reasons) == (kind != "ok"), (key, kind)
        if kind == "ok":
            assert texts[key] == f"picture no {i}"
        else:
            assert CAUSES[kind] in reasons[key], (kind, reasons[key])
    counted = collections.Counter(reasons.values()) | {"success": len(texts)}
    assert manifest["info"]["img2dataset"]["train"] == dict(counted)

    # killed in its second shard: the tar's tail and the missing status are counted, the rest is read
    second = tmp_path / "shards" / "00001.tar"
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    (tmp_path / "shards" / "00001_stats.json").unlink()
    cut = convert.run(convert.Job(str(tmp_path / "shards"), str(tmp_path / "cut"), given=given))
    assert cut["info"]["tar"]["train"] == {"truncated": 1}
    assert cut["info"]["img2dataset"]["train"]["unfinished_shards"] == 1
    assert 0 < cut["splits"]["train"]["num_records"] < len(texts)
    find = functools.partial(img2dataset.counts, [str(second)])
    assert find() == {}  # nothing is said of a shard without its status
