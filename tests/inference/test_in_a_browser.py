"""The pages in headless Chromium: nothing hostile runs, and nothing is wider than a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest

from ponder.inference.comparison import write_comparison
from ponder.inference.evaluation import evaluate
from ponder.inference.report import write_report

from .test_comparison import two_models
from .test_report import HOSTILE, make_store

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# The page in a frame of that width, all of it unfolded; what is found becomes the title.
FRAME = """<!doctype html><iframe id="f" style="width:{width}px;height:900px;border:0"
srcdoc="{page}"></iframe><script>onload = () => {{
  const page = f.contentDocument;
  const tables = [...page.querySelectorAll(".scroll")].filter(table => !table.closest("details"));
  page.querySelectorAll("details").forEach(part => part.open = true);
  document.title = JSON.stringify({{
    wide: page.documentElement.scrollWidth,
    scrolled: tables.map(table => table.scrollWidth / table.clientWidth),
    figures: [...page.querySelectorAll("svg")].map(figure => figure.clientWidth),
    text: page.body.innerText.length,
    ran: typeof f.contentWindow.owned,
  }});
}}</script>"""
ATTACKS = ("<script>owned = 1</script>", "</pre><img src=x onerror='owned = 1'>", *HOSTILE)


def seen(path, tmp_path, width: int) -> dict:
    """What Chromium finds in a page that is `width` pixels wide."""
    frame = tmp_path / "frame.html"
    page = html.escape(path.read_text(encoding="utf-8"))
    frame.write_text(FRAME.format(width=width, page=page), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 60},1000"]
    run = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    [title] = re.findall("<title>(.*?)</title>", run.stdout)[:1]
    return json.loads(html.unescape(title))


def a_report(tmp_path):
    store = make_store(tmp_path / "s", texts=ATTACKS, task=ATTACKS[0], problems=14, samples=8)
    results = evaluate(store, model=ATTACKS[1])
    return write_report(tmp_path / "report", results, store, run={ATTACKS[0]: ATTACKS[1]})


def a_comparison(tmp_path):
    return write_comparison(tmp_path / "out", *two_models(tmp_path, ATTACKS[:2]))


@pytest.mark.parametrize("make", [a_report, a_comparison])
def test_a_page_fits_a_phone_and_runs_nothing(tmp_path, make):
    path = make(tmp_path)
    for width in (360, 1280):
        found = seen(path, tmp_path, width)
        assert found["wide"] <= width and found["text"] > 1000
        assert 0 < max(found["figures"]) <= width  # some are folded away: their width is 0
        assert found["ran"] == "undefined"
        # But for the table of all rows, which is folded, and for long names beside a figure.
        assert width > 360 or max(found["scrolled"]) < 1.15


def test_a_page_that_does_is_found_out(tmp_path):
    path = tmp_path / "bad.html"
    wide = "<div style='width:500px'>wide</div><svg width=9></svg>"
    path.write_text(f"<!doctype html><body>{wide}{ATTACKS[0]}")
    found = seen(path, tmp_path, 360)
    assert found["wide"] >= 500 and found["ran"] == "number"
