"""The page of results: whole without a network, drawn without an error, readable on a phone."""

import contextlib
import html
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from benchmarks.experiments.colors import method_colors
from benchmarks.papers import perplexity_tables
from benchmarks.report import results_page as page

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    not (DRIVER and BROWSER), reason="needs chromium and chromedriver (apt: chromium-driver)"
)
# In one answer: what is wider than the screen, which charts are empty, which marks show nothing.
LOOK = """
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") &&
  !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML);
const charts = [...document.querySelectorAll("figure")].map(f => {
  const marks = [...f.querySelectorAll("path[data-method], circle")];
  return {kind: f.className, marks: marks.length, width: f.querySelector("svg").clientWidth,
    bad: marks.filter(m => /NaN|Infinity|undefined/.test(m.outerHTML) ||
      getComputedStyle(m).stroke === "none").length};
});
const dots = [...document.querySelectorAll("table .dot, .legend .dot")].map(
  d => [d.parentElement.textContent, getComputedStyle(d).backgroundColor]);
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const covered = [...document.querySelectorAll(".front svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const [names, marks] = ["text.label", "circle"].map(
    what => [...svg.querySelectorAll(what)].map(e => [e.textContent, e.getBoundingClientRect()]));
  return names.flatMap(([name, a], i) => [...names.slice(0, i), ...marks].filter(
    ([, b]) => meet(a, b) || a.left < frame.left || a.right > frame.right).map(([b]) => [name, b]));
});
return {width: innerWidth, page: document.documentElement.scrollWidth, wide, charts,
  paper: getComputedStyle(document.body).backgroundColor, dots, covered,
  names: document.querySelectorAll(".front text.label").length,
  requests: performance.getEntriesByType("resource").map(r => r.name)};
"""
SORT = """
const table = document.querySelector("table"), column = arguments[0];
table.querySelectorAll("th button")[column].click();
return [...table.tBodies[0].rows].map(r => r.cells[column].textContent);
"""


@pytest.fixture(scope="module")
def text():
    return page.render()


def test_the_page_needs_nothing_else(text):
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", text)
    assert text.count("<section") == len(page.sections()) >= 3


def test_no_two_links_at_the_top_have_one_name(text):
    links = re.findall(r"<a [^>]*>([^<]+)</a>", re.search(r"<nav>(.*?)</nav>", text)[1])
    headings = re.findall(r"<h2>([^<]+)</h2>", text)
    assert links == headings and len(set(links)) == len(links) == len(page.sections()) > 5


def test_a_method_has_the_colour_of_the_pictures(text):
    [data] = re.findall(r'id="data">(.*?)</script>', text)
    drawn = {section["id"]: section["colors"] for section in json.loads(data)}
    for section in page.sections():
        colors = method_colors(row["method"] for row in section["rows"])
        assert drawn[section["id"]] == colors
        start = text.index(f'<section id="{section["id"]}"')
        dots = re.findall(r"--color: (#\w+)", text[start : text.index("</section>", start)])
        assert dots == [colors[row["method"]] for row in section["rows"]]


def test_the_front_is_of_our_runs_that_no_other_beats():
    for section in page.sections():
        ours = [p for p in section["front"] if not p["paper"]]
        best = [p["best"] for p in ours]
        assert best == [
            not any(round(o["x"]) <= round(p["x"]) and o["y"] < p["y"] for o in ours) for p in ours
        ]
        assert not any(p["best"] for p in section["front"] if p["paper"])


def test_its_tables_are_the_rows(text):
    for section in page.sections():
        start = text.index(f'<section id="{section["id"]}"')
        body = text[start : text.index("</section>", start)]
        assert len(section["rows"]) == body.count("<tr>") - 1
        for row in section["rows"]:
            assert all(html.escape(cell) in body for cell in row["cells"])
            commit, seed = row["made"].split(",")[0], re.search(r"; seed [\d, ]+; ", row["made"])
            assert html.escape(row["made"]) in body and commit and seed


def test_a_name_cannot_break_out_of_the_page(monkeypatch):
    table = perplexity_tables.TABLES["scale-main"]
    bad = "</script><script>alert(1)</script>"
    rows = perplexity_tables.stored_rows(table, "nano")
    section = page._beside_section("x", table, "nano", rows)
    for part in ("rows", "curves", "front"):
        for item in section[part]:
            item["label"] = item["method"] = bad
    monkeypatch.setattr(page, "sections", lambda own: [section])
    assert page.render().count("<script>") == 1


class Browser:
    """A headless Chromium behind chromedriver's HTTP interface."""

    def __init__(self, port: int, width: int, dark: bool) -> None:
        self.base = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {
            "binary": BROWSER,
            "args": [*flags, *(["--blink-settings=preferredColorScheme=0"] if dark else [])],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": 800, "pixelRatio": 2}},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path: str, body: dict | None = None, method: str = "POST") -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *args: object) -> dict:
        return self.call("/execute/sync", {"script": script, "args": list(args)})


@pytest.fixture
def port():
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        for line in driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                yield int(found[1])
                break
    finally:
        driver.terminate()
        driver.wait(timeout=30)


@needs_browser
def test_in_a_browser(text, port, tmp_path):
    path = Path(tmp_path / "index.html")
    path.write_text(text, encoding="utf-8")
    papers = set()
    for width, dark in ((390, False), (1200, True)):
        browser = Browser(port, width, dark)
        try:
            browser.call("/url", {"url": path.as_uri()})
            seen = browser.run(LOOK)
            assert browser.call("/se/log", {"type": "browser"}) == []
            assert seen["width"] == seen["page"] == width and seen["wide"] == []
            assert seen["requests"] == []
            drawn = [chart["kind"] for chart in seen["charts"]]
            expected = [k for s in page.sections() for k in ("curves", "front") if s[k]]
            assert drawn == expected and "front" in drawn
            assert all(c["marks"] >= 2 and c["width"] > 250 for c in seen["charts"])
            assert all(chart["bad"] == 0 for chart in seen["charts"])
            assert seen["covered"] == [] and seen["names"] > 20
            assert len({color for _, color in seen["dots"]}) >= 16
            papers.add(seen["paper"])
            up, down = browser.run(SORT, 3), browser.run(SORT, 3)
            ranks = [int(x) for x in up if x != "-"]
            assert ranks == sorted(ranks) and down[: len(ranks)] == [str(r) for r in ranks[::-1]]
        finally:
            with contextlib.suppress(OSError):
                browser.call("", method="DELETE")
    assert len(papers) == 2  # light and dark
