"""The documentation site is built strictly; every link in it leads somewhere, and it loads nothing from a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from odtk.cli import COMMANDS
from odtk.settings import flag, options

TOP = Path(__file__).parent.parent


class Page(HTMLParser):
    """The ids of a page, what it links to, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        else:
            self.loads |= {given[name] for name in ("src", "href") if name in given}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(TOP / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_comes_from_a_network(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert {"index.html", "all-settings.html", "api.html", "CONTRIBUTING.html"} <= {path.name for path in pages}
    broken = []
    for path, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    broken.append(f"{path.name} loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if path.name == "404.html":  # its links begin at the top of a server
                target = site / unquote(parts.path).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{path.name} → {link}: no such file")
            elif target in pages and parts.fragment not in pages[target].ids | {"", "__skip"}:
                broken.append(f"{path.name} → {link}: no such heading")
    assert not broken
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?https?:", path.read_text()), path


@pytest.mark.slow
def test_the_page_of_settings_has_every_setting_of_every_command(site: Path) -> None:
    page = (site / "all-settings.html").read_text()
    for name, (cls, _, _) in COMMANDS.items():
        part = page.partition(f'id="odtk-{name}"')[2].partition('<h2 id="')[0]
        missing = [one for one, o in options(cls).items() if not o.positional and f"<code>{flag(one)}" not in part]
        assert name == "plan" or not missing


def test_readme_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (TOP / "README.md").read_text())
    assert links
    assert [link for link in links if "://" not in link and not (TOP / link).exists()] == []
