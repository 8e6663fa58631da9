"""report.html and tune.html: what they say, and how a browser shows them.

The browser is Debian's (`apt-get install chromium chromium-driver`), driven by selenium; contrast and structure are checked
by axe-core. Where one of them is missing, those tests are skipped.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import recray
from helpers.small_logs import write
from helpers.small_run import make_run, small_config
from recray.artifacts import REPORT, in_use
from recray.config import parse_config
from recray.evaluation import slices
from recray.lineage import lineage
from recray.metrics import ranking
from recray.records import CheckpointRecord, ReportRecord
from recray.report import charts, html, page, titles

pytest.importorskip("plotly")

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a small run."""
    config = small_config(tmp_path_factory.mktemp("page"), "evaluation.bootstrap=50", "evaluation.k=[5, 10]")
    make_run(config)
    return in_use(config.run_uri, REPORT).uri


def _own(text: str) -> str:
    """The page without plotly's script."""
    return text[: text.index("<script>")] + text[text.index("<main>") :]


def test_the_page_stands_alone_and_has_every_part(folder: str) -> None:
    report, text = ReportRecord.read(folder), (Path(folder) / page.FILE).read_text()
    own = _own(text)
    assert len(text.encode()) < 6 * MEGABYTE
    assert not re.search(r"""src=|href="[^#]|@import|url\(|https?://""", own)
    assert own.count('class="plot" role="img" aria-label=') == own.count("Plotly.newPlot(") >= 8
    for sentence in report.verdict:
        assert sentence.removeprefix("try next: ") in own
    assert f">{report.metrics['index']['ndcg@10'].value:.4f}<" in own
    for section in (
        "metrics",
        "by-history",
        "by-popularity",
        "training",
        "index",
        "time",
        "examples",
        "lineage",
        "data",
    ):
        assert f'id="{section}"' in own and f'href="#{section}"' in own
    assert own.count("<h3>User ") == len(report.examples) > 0
    assert own.count("(hit)") == sum(
        key in one.targets for one in report.examples for keys in one.lists.values() for key in keys if key
    )
    assert "model.dim" in own and "training.epochs" in own


def test_the_page_is_written_again_and_is_no_damage(folder: str) -> None:
    (Path(folder) / page.FILE).unlink()
    assert page.write(folder) == f"{folder}/{page.FILE}"
    assert all(not one.problems for one in recray.verify(folder))


def test_slices_add_up_to_the_report(folder: str) -> None:
    """The weighted mean over the groups of queries is the report's value; groups of targets hold every target once."""
    report = ReportRecord.read(folder)
    for system, values in report.metrics.items():
        by_history = [one for one in report.slices if one.by == "history"]
        assert sum(one.size for one in by_history) == report.counts["queries"]
        mean = sum(one.size * one.values[system].value for one in by_history) / report.counts["queries"]
        assert mean == pytest.approx(values["ndcg@10"].value, rel=1e-9)
    for by in ("popularity", "age"):
        assert sum(one.size for one in report.slices if one.by == by) == report.counts["targets"]
    for one in report.slices:
        assert one.gains["popularity"].value == pytest.approx(
            one.values["model"].value - one.values["popularity"].value
        )


def test_groups_of_counts() -> None:
    values = np.array([0, 1, 2, 4, 5, 9, 700, 3])
    groups = {name: np.flatnonzero(mask).tolist() for name, mask in slices.of_histories(values)}
    assert groups == {"1": [1], "2 to 4": [2, 3, 7], "5 to 9": [4, 5], "500 and more": [6]}


def test_found_targets_are_those_in_the_list() -> None:
    """Against a plain loop; unknown items and padding are found in no list."""
    rng = np.random.default_rng(3)
    lists, lengths = rng.integers(0, 12, (40, 5)), rng.integers(0, 6, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(1, 12, offsets[-1])
    expected = [
        bool(value >= 2 and value in row)
        for row, start, stop in zip(lists, offsets[:-1], offsets[1:], strict=True)
        for value in values[start:stop]
    ]
    assert ranking.found(lists, values, offsets).tolist() == expected


def test_text_from_the_log_is_escaped() -> None:
    text = html.table(["<b>"], [["</script><i>"]]) + html.figure([{"x": ["</script>"]}], "<u>", "x", "y")
    assert "<b>" not in text and "<i>" not in text and "<u>" not in text
    assert text.count("</script>") == 1


def test_one_epoch_has_no_curve(folder: str) -> None:
    record = lineage(folder).parents[0].record
    assert isinstance(record, CheckpointRecord)
    one = charts.curves(record.model_copy(update={"history": record.history[:1]}))
    assert len(one) == 2 and "Plotly" not in "".join(one) and "after epoch 1, the only one." in one[0]
    assert "Plotly" in "".join(charts.curves(record))


def test_titles_of_a_column_that_is_named(tmp_path: Path) -> None:
    table = pa.table({"item_id": [1, 2, 3], "name": ["a", "b", None], "headline_en": ["A", "B", "C"]})
    path = write(tmp_path / "items.parquet", table)
    example = {"history": ["1"], "targets": ["2"], "lists": {"model": ["3", "9", ""]}}

    def of(title: str | None) -> dict[str, str]:
        config = parse_config({"data": {"items": path}, "report": {"title": title} if title else {}})
        return titles.of_items(config, [example])

    assert of(None) == {"1": "a", "2": "b"}
    assert of("headline_en") == {"1": "A", "2": "B", "3": "C"}
    assert of("headline") == {}  # warns, and names the columns


# ---- in a browser

_BROWSER = shutil.which("chromium"), shutil.which("chromedriver")
_DRIVER = all(importlib.util.find_spec(name) for name in ("selenium", "axe_core_python"))
_ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not all(_BROWSER):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    if not _DRIVER:
        pytest.skip("no driver: pip install selenium axe-core-python")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.binary_location = _BROWSER[0] or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_BROWSER[1] or ""))
    driver.set_script_timeout(100)  # axe-core takes long on a busy machine
    yield driver
    driver.quit()


_SMALL = """
return [...document.querySelectorAll('body *')].filter(one => !['SCRIPT', 'STYLE'].includes(one.tagName) &&
  [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) &&
  parseFloat(getComputedStyle(one).fontSize) < 11).map(one => one.textContent)"""
_CUT = """
return [...document.querySelectorAll('.plot text')].filter(text => {
  const plot = text.closest('.plot').getBoundingClientRect(), box = text.getBoundingClientRect()
  return box.width && (box.left < plot.left - 2 || box.right > plot.right + 2 || box.bottom > plot.bottom + 2)
}).map(text => text.textContent)"""
_AXE = """
const done = arguments[0]
axe.run().then(found => done(found.violations.map(one => [one.id, one.nodes[0].html.slice(0, 200)])))"""


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser: Any, folder: str, width: int, scheme: str) -> None:
    import axe_core_python

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    browser.get((Path(folder) / page.FILE).as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(_SMALL) == []
    assert browser.execute_script(_CUT) == []
    browser.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text())
    assert browser.execute_async_script(_AXE) == []


def test_paper_is_as_wide_as_the_page(browser: Any, folder: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    size = {"width": 718, "height": 1040, "deviceScaleFactor": 1, "mobile": False}  # A4 with margins
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((Path(folder) / page.FILE).as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 718


def test_a_table_sorts_by_a_click(browser: Any, folder: str) -> None:
    browser.get((Path(folder) / page.FILE).as_uri())
    read = "return [...document.querySelector('#metrics table').tBodies[0].rows].map(row => parseFloat(row.cells[1].textContent))"
    click = "document.querySelectorAll('#metrics table th button')[1].click()"
    browser.execute_script(click)
    up = browser.execute_script(read)
    browser.execute_script(click)
    assert up == sorted(up) and browser.execute_script(read) == sorted(up, reverse=True)
