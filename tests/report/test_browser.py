"""In a real browser, where there is one: four screens before the galleries at most, no sideways scroll, live charts."""

import json
import re
import shutil
import subprocess

import pytest

from helpers import fake_run
from vlp.report import html, load

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
MEASURE = """<script>addEventListener("load", () => {
  const press = new PointerEvent("pointerdown", {clientX: 200});
  for (const svg of document.querySelectorAll(".plot > svg")) svg.dispatchEvent(press);
  const top = document.querySelector("#retrieval, footer.end").getBoundingClientRect().top;
  parent.postMessage({wide: document.documentElement.scrollWidth, top: top + scrollY,
    charts: document.querySelectorAll(".plot").length,
    readouts: document.querySelectorAll(".tip:not([hidden])").length}, "*");
});</script>"""


def _measure(tmp_path, text: str, width: int) -> dict:
    """The page's width, and how far its galleries (or its end) are from its top, in pixels.

    It is measured in a frame, which can be narrower than a window. The policy would stop the script that measures.
    """
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", text)
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE + "</body>"))
    frame = f"<iframe src='page.html' style='border:0;width:{width}px;height:800px'></iframe>"
    hear = """<script>addEventListener("message", (said) =>
      document.body.append("measured " + JSON.stringify(said.data)))</script>"""
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{hear}{frame}</body>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
               "--allow-file-access-from-files", "--virtual-time-budget=10000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
               f"file://{tmp_path / 'frame.html'}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    return json.loads(re.search(r"measured (\{.*?\})", dom)[1])


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("kind", ["run", "many evaluations", "runs"])
def test_pages_fit_a_narrow_window(tmp_path, kind):
    runs = [fake_run.write(tmp_path / f"run-with-a-long-name-{i}", num_rows=60, seed=i) for i in range(3)]  # fmt: skip
    if kind == "many evaluations":
        path = runs[0] / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows += [r | {"eval": f"other_{i}"} for r in rows for i in range(8) if "i2t/R@1" in r]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind != "runs":
        text = html.page(load.load(runs[0]))
    else:
        text = html.comparison([load.load(run) for run in runs])
    wide = _measure(tmp_path, text, 1280)
    assert wide["wide"] <= 1280 and wide["top"] < 4 * 800
    assert wide["charts"] == wide["readouts"] > 5  # every chart answers a pointer
    narrow = _measure(tmp_path, text, 400)
    assert narrow["wide"] <= 400
