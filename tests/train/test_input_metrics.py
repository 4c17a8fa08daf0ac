"""What metrics.jsonl says about a run's input."""

import json

from helpers import runs


def test_the_record_tells_of_reads_texts_and_memory(tmp_path, toy):
    assert runs.train(runs.TOY, tmp_path / "run") == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in rows if r["kind"] == "train" and "time/rss_mb" in r][-1]
    assert last["time/rss_mb"] > 50 and 0 <= last["time/input_truncated_frac"] < 1
    shares = [last[f"time/input_share_{k}"] for k in ("read", "image", "text")]
    assert abs(sum(shares) - 1) < 1e-3 and 0 <= last["time/data_wait_frac"] <= 1
