"""The report in a real browser: it draws, it fits, it says nothing to the console, and samples stay text."""

import json
import re
import subprocess

import pytest
from run_files import CONFIG, train_row, val_row

from chromium import CHROMIUM, FLAGS
from regpt.report.compare import compare
from regpt.report.markup import printable
from regpt.report.page import write_diff, write_overlay, write_report
from regpt.report.read import read_run

HOSTILE = "Hello</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\x00"
# Presses every control, then tells the page around it what it sees.
PROBE = """<script>
const hues = ["train", "val", "c0", "c1", "c2", "c3", "c4", "c5", "c6"].map((name) => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  return hex.match(/[0-9a-f]{2}/g).map((byte) => parseInt(byte, 16));
});
/** Whether a canvas holds something in the colour of a line: the axes alone are grey. */
function lined(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] > 200 && hues.some((hue) => hue.every((x, k) => Math.abs(x - data[i + k]) < 6))) return true;
  }
  return false;
}
const least = (selector, measure) => Math.min(...[...document.querySelectorAll(selector)].map(measure));
addEventListener("load", () => setTimeout(() => {
  const empty = [...document.querySelectorAll(".panel")].filter((one) => !lined(one.querySelector("canvas")));
  for (const button of document.querySelectorAll("button")) button.click();
  const slider = document.querySelector("input[type=range]");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  for (const box of document.querySelectorAll("details")) box.open = true;
  setTimeout(() => parent.postMessage({
    width: innerWidth,
    beyond: document.documentElement.scrollWidth - innerWidth,
    smallest: least("button, input", (one) => one.getBoundingClientRect().height),
    narrowest: least(".plot", (one) => one.clientWidth),
    wide: [...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > innerWidth + 1
      && !one.closest(".scroll")).map((one) => one.tagName + "." + one.className).slice(0, 5),
    empty: empty.map((one) => one.querySelector("h3").textContent),
    charts: document.querySelectorAll("canvas").length,
    drawn: [...document.querySelectorAll("canvas")].every((one) =>
      one.getContext("2d").getImageData(0, 0, one.width, one.height).data.some((byte) => byte)),
    legend: document.querySelector(".u-legend").textContent,
    sample: document.querySelector(".text").textContent,
    pwned: typeof window.pwned,
  }, "*"), 300);
}, 100));
</script></body>"""
# Chromium's window is never below 500 px wide; a frame is.
AROUND = """<body style="margin:0"><script>
const seen = [];
addEventListener("message", (event) => { seen.push(event.data); document.title = JSON.stringify(seen); });
</script>"""


def look(page, tmp_path, widths):
    """What the probe saw at each width, and every line the browser wrote to its console."""
    page = page.read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" style="border:0;width:{width}px;height:900px"></iframe>' for width in widths
    )
    around = tmp_path / "around.html"
    around.write_text(AROUND + frames, encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1600,1000",
    ]
    command += ["--virtual-time-budget=5000", "--dump-dom", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return {one["width"]: one for one in seen}, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def assert_usable(one):
    """Nothing beyond the edge, charts wide enough to read, controls large enough to hit (WCAG 2.2: 24 pixels)."""
    assert one["beyond"] <= 0, one["wide"]
    assert one["narrowest"] >= min(300, 0.75 * one["width"])
    assert one["smallest"] >= 24
    assert one["drawn"]
    assert not one["empty"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
class TestInABrowser:
    def test_it_draws_and_fits_on_a_phone_and_a_desk(self, make_run, tmp_path):
        samples = [{"step": step, "prompt": HOSTILE, "texts": [HOSTILE + HOSTILE, "x" * 3000]} for step in (0, 20, 40)]
        rows = [
            val_row(0, 8.0),
            *(train_row(step, mfu=0.4, peak_memory_gib=3.0) for step in range(1, 41)),
            val_row(40, 3.25),
        ]
        rows.append({"kind": "event", "step": 20, "name": "resumed", "checkpoint": "w" * 300})
        rows += [
            {"kind": "updates", "step": step, "ratio": 1e-3, "ratios": {"wte": 1e-3, "c_fc": 2e-3}} for step in (1, 40)
        ]
        rows += [
            {"kind": "eval", "step": step, "task": task, "metric": metric, "value": 0.3, "n": 10}
            for step in (0, 40)
            for task, metric in (("hellaswag", "acc_norm"), ("hellaswag", "acc"), ("core", "centered"))
        ]
        config = f'[model]\nn_layer = 2\nlong = "{"y" * 400}"\n'
        seen, console = look(write_report(make_run(rows=rows, samples=samples, config=config)), tmp_path, (400, 1400))
        assert not console
        assert sorted(seen) == [400, 1400]
        for one in seen.values():
            assert_usable(one)
            assert one["charts"] == 9
            assert "3.2500" in one["legend"]
            assert one["sample"] == printable(HOSTILE + HOSTILE)
            assert one["pwned"] == "undefined"

    def test_a_run_of_one_step_without_anything_else_is_drawn(self, make_run, tmp_path):
        samples = [{"step": step, "prompt": "", "texts": ["a"]} for step in (1, 2)]
        rows = [{"kind": "train", "step": 1, "loss": 4.0}, {"kind": "val", "step": 1, "loss": None}]
        seen, console = look(write_report(make_run(rows=rows, samples=samples, env={}, config="")), tmp_path, (1000,))
        assert not console
        assert (seen[1000]["charts"], seen[1000]["drawn"]) == (1, True)

    def test_a_loss_that_became_nan_leaves_a_gap(self, make_run, tmp_path):
        rows = [train_row(step, loss=float("nan") if step > 20 else 4.0) for step in range(1, 41)]
        seen, console = look(write_report(make_run(rows=rows)), tmp_path, (1000,))
        assert not console
        assert seen[1000]["drawn"]

    def test_a_comparison_of_two_runs_shows_both_and_their_difference(self, make_run, tmp_path):
        vals = [val_row(0, 8.0), val_row(20, 4.0), val_row(40, 3.25)]
        rows = [train_row(step, loss=3.1 + 5 / step) for step in range(1, 41)]
        other = CONFIG.replace("n_layer = 2", f'n_layer = 3\nlong = "{"y" * 300}"')
        runs = [read_run(make_run()), read_run(make_run(rows=[*rows, *vals], config=other, name="run-2"))]
        seen, console = look(write_diff(compare(*runs), tmp_path / "diff.html"), tmp_path, (400, 1400))
        assert not console
        assert sorted(seen) == [400, 1400]
        for one in seen.values():
            assert_usable(one)
            assert one["charts"] == 6

    def test_several_runs_of_different_tokenizers_are_drawn_over_each_other(self, make_run, tmp_path):
        vals = [val_row(0, 8.0), val_row(40, 3.25)]
        runs = [
            make_run(
                rows=[*(train_row(step, tokens=1000 * step + i) for step in range(1, 41)), *vals],
                env={"data": {"tokenizer": f"bpe-{i}"}, "device": "cpu"},
                name="n" * 60 + str(i),
            )
            for i in range(10)
        ]
        seen, console = look(write_overlay(runs, tmp_path / "overlay.html"), tmp_path, (400, 1400))
        assert not console
        assert sorted(seen) == [400, 1400]
        for one in seen.values():
            assert_usable(one)
            assert one["charts"] == 5
            assert "0.8125" in one["legend"]
