"""The pages about plug-ins name what exists."""

import re
from pathlib import Path

import pytest

from helpers.pages import pages
from recray import registry
from recray.registry import Kind

ROOT = Path(__file__).parents[2]
PAGES: dict[Kind, str] = {
    "model": "recray/models/README.md",
    "loss": "recray/losses/README.md",
    "metric": "recray/metrics/README.md",
    "source": "recray/data/sources/README.md",
}


@pytest.mark.parametrize("kind", list(PAGES))
def test_a_page_is_short_lists_every_shipped_plugin_and_links_to_files(kind: Kind) -> None:
    page = ROOT / PAGES[kind]
    text = page.read_text()
    assert len(text.splitlines()) <= 60
    assert [name for name in registry.names(kind) if f"`{name}`" not in text] == []
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("kind", list(PAGES))
def test_an_error_points_to_a_page_that_exists(kind: Kind) -> None:
    with pytest.raises(Exception, match=re.escape(PAGES[kind])):
        registry.load(kind, "nothing_like_it")


def test_the_readme_is_short_and_its_links_lead_to_files() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert any(line.startswith("    make demo") for line in lines[:25])
    for page in pages():
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
        assert [link for link in links if link and not (page.parent / link).exists()] == [], page
