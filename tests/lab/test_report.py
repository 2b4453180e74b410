"""The report: one file per trial that needs nothing else, right numbers, and charts that draw."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import outcomes as made
import pytest

from danlu.lab import charts, report
from danlu.lab.errors import MissingExtraError, StoreError
from danlu.lab.report import write_figure, write_report

ALL = {
    "attention-rerope": made.rerope_like,
    "optim-tiger": made.tiger_like,
    "losses-tailr": made.tailr_like,
    "optim-many": made.many_arms,
    "local-café--x-": made.hostile,
}


class Page(HTMLParser):
    """Text, tags and addresses of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._skip = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.text += data + " "

    def says(self, text: str) -> bool:
        """Whether the page shows `text`; code marks and line breaks do not count."""
        return _words(text) in _words(self.text)

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _words(text: str) -> str:
    return re.sub(r"[\s`]+", "", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert write_report([make() for make in ALL.values()], folder) == folder / "index.html"
    return folder


def test_one_file_per_trial_and_a_gallery(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{name}.html" for name in ALL} | {"index.html"}
    index = Page(folder / "index.html")
    links = {attributes["href"] for attributes in index.having("a")}
    assert {"attention-rerope.html", "optim-tiger.html", "losses-tailr.html"} <= links
    for outcome in (made.rerope_like(), made.tiger_like(), made.tailr_like()):
        assert index.says(outcome.claim)
        assert outcome.verdict in index.text


@pytest.mark.parametrize("name", [*ALL, "index"])
def test_nothing_is_loaded_from_elsewhere(folder, name):
    page = Page(folder / f"{name}.html")
    assert all((attributes["href"] or "").startswith("data:") for attributes in page.having("link"))
    assert all("src" not in attributes for _, attributes in page.tags)
    assert (folder / f"{name}.html").stat().st_size < (2.5e6 if name != "index" else 1e5)
    (html,) = page.having("html")
    assert html["lang"] == "en"
    assert len(page.having("h1")) == 1
    assert any(attributes.get("name") == "viewport" for attributes in page.having("meta"))


@pytest.mark.parametrize("name", ["attention-rerope", "optim-tiger", "losses-tailr"])
def test_page_says_what_the_outcome_says(folder, name):
    outcome, page = ALL[name](), Page(folder / f"{name}.html")
    assert page.says(outcome.claim)
    assert outcome.verdict in page.text
    assert outcome.command in page.text
    assert outcome.data["sha256"] in page.text
    for part in outcome.parts:
        assert part.comparison.candidate in page.text
    for arm in outcome.arms:
        assert arm.name in page.text
    assert page.having("math")
    # Every chart has a text for those who do not see it.
    charts = [a for a in page.having("div") if "chart" in (a.get("class") or "")]
    assert charts
    assert all(a.get("aria-label") or a.get("aria-labelledby") for a in charts if a.get("role") == "img")


def test_numbers_follow_the_interval(folder):
    outcome = made.rerope_like()
    (lead, *_) = outcome.parts
    text = Page(folder / "attention-rerope.html").text
    for part in outcome.parts:
        # The mean of the gain, at two digits of the interval's width.
        digits = max(0, 1 - math.floor(math.log10(part.gain.high - part.gain.low)))
        assert f"{abs(part.gain.mean):.{min(digits, 2)}f}"[:3] in text
    assert f"over {len(outcome.seeds)} seeds" in text
    assert lead.comparison.metric in text


def test_banners(tmp_path):
    texts = {}
    for published, size in ((True, "report"), (False, "report"), (True, "demo")):
        write_report([made.tiger_like(published=published, size=size)], tmp_path)
        texts[published, size] = Page(tmp_path / "optim-tiger.html").text
    assert "not for publication" in texts[False, "report"]
    assert "not for publication" not in texts[True, "report"]
    assert "small budget" in texts[True, "demo"]
    assert "small budget" not in texts[True, "report"]


def test_markup_in_strings_is_text(folder):
    source = (folder / "local-café--x-.html").read_text(encoding="utf-8")
    page = Page(folder / "local-café--x-.html")
    assert page.having("img") == []
    assert "<img src=x" not in re.sub(r"<script[^>]*>.*?</script>", "", source, flags=re.DOTALL)
    # Data in scripts cannot end them.
    assert len(page.having("script")) == source.count("</script>")
    assert "丹炉" in page.text


def test_gallery_adjusts_over_all_claims(tmp_path):
    one = made.rerope_like()
    many = [replace(one, trial=f"attention/copy{i}") for i in range(4)] + [made.tailr_like()]
    write_report(many, tmp_path)
    assert "5 trials" in Page(tmp_path / "index.html").text


def test_two_outcomes_of_one_trial_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which are one file"):
        write_report([made.tiger_like(), made.tiger_like()], tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        write_report([made.tiger_like()], tmp_path / "file")


def test_missing_chart_library_is_said(tmp_path, monkeypatch):
    report._bundle.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'danlu\[lab\]'"):
        write_report([made.tiger_like()], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["attention-rerope", "optim-tiger", "losses-tailr"])
def test_figures(tmp_path, name):
    svg = write_figure(ALL[name](), tmp_path / "figure.svg").read_text()
    assert svg.startswith("<svg")
    assert svg.count("<path") > 5
    assert write_figure(ALL[name](), tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        write_figure(ALL[name](), tmp_path / "figure.pdf")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("no chromium at /usr/bin/chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize("name", [*ALL, "index"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(folder, browser, name, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    address = (folder / f"{name}.html").as_uri()
    page.goto(address)
    try:
        if name != "index":
            page.wait_for_function("document.querySelectorAll('.chart svg').length > 0", timeout=20_000)
            page.wait_for_timeout(500)
        assert problems == []
        assert requests == [address]
        # A phone scrolls the page up and down only.
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if name in ("attention-rerope", "optim-tiger", "losses-tailr"):
            drawn = page.evaluate(
                "[...document.querySelectorAll('.chart')].map(c => [...c.querySelectorAll("
                "'.mark-line path, .mark-symbol path, .mark-rule line, .mark-tick path')]"
                ".filter(m => m.getBoundingClientRect().width + m.getBoundingClientRect().height > 0).length)"
            )
            assert len(drawn) >= 3
            assert all(count > 0 for count in drawn), json.dumps(drawn)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert (brightness > 128) == (scheme == "light")
    finally:
        page.close()


def test_scores_of_different_size_share_a_logarithmic_axis():
    close = made.outcome(
        "lab/drawn", [made.arm("a", {"loss": [30.0, 31.0]}), made.arm("b", {"loss": [40.0, 599.0]})], []
    )
    far = made.outcome("lab/drawn", [made.arm("a", {"loss": [30.0, 31.0]}), made.arm("b", {"loss": [40.0, 601.0]})], [])
    signed = made.outcome(
        "lab/drawn", [made.arm("a", {"loss": [-1.0, 31.0]}), made.arm("b", {"loss": [40.0, 601.0]})], []
    )

    def scale(outcome):
        return charts.paired_chart(outcome, "loss", charts.LIGHT)["layer"][0]["encoding"]["x"]["scale"]

    assert scale(far)["type"] == "log"
    low, high = scale(far)["domain"]
    assert 0 < low < 30 < 601 < high
    assert "type" not in scale(close)
    assert "type" not in scale(signed)


def test_the_key_of_many_arms_is_broken_into_rows():
    names = [f"a_rather_long_name_of_arm_{i}" for i in range(12)]
    outcome = made.outcome(
        "lab/drawn", [made.arm(name, {"loss@a": [1.0, 2.0], "loss@b": [2.0, 3.0]}) for name in names], []
    )
    spec = charts.condition_chart(outcome, "loss", charts.LIGHT, alone=True)
    assert spec["layer"][0]["encoding"]["color"]["legend"]["columns"] == 2
