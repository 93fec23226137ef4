"""The site as `make docs` builds it: nothing leads nowhere, and all that there is has its place."""

import functools
import re
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import lightning_adam
from lightning_adam import findings, schema
from lightning_adam.explaining import TOPICS
from lightning_adam.findings import RULES
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS
from tests.support.commands import BIN, REPOSITORY, run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOST = "http://site"
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
"""What a browser asks for by itself, and by which attribute."""


@dataclass
class Page:
    """What a page of the site says and leads to."""

    address: str
    text: str = ""
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class Reader(HTMLParser):
    """Reads a page."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.page = Page(address)
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.page.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        address = given.get(LOADED.get(tag, ""), "")
        if tag == "a" and "href" in given:
            self.page.links.append(urljoin(self.page.address, given["href"]))
        if address and not address.startswith("data:"):
            self.page.loaded.append(urljoin(self.page.address, address))
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        self.page.text += "" if self.silent else data


def address_of(file: Path, folder: Path) -> str:
    path = file.relative_to(folder).as_posix().removesuffix("index.html")
    return f"{HOST}/{path}"


def read(file: Path, folder: Path) -> Page:
    reader = Reader(address_of(file, folder))
    reader.feed(file.read_text(encoding="utf-8"))
    reader.page.text = " ".join(reader.page.text.split())
    return reader.page


@dataclass
class Site:
    """The built site."""

    folder: Path
    output: str
    pages: dict[str, Page]

    def at(self, path: str) -> Page:
        return self.pages[f"{HOST}/{path}"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site, built by the line of the Makefile."""
    folder = tmp_path_factory.mktemp("site")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^docs:.*\n\t(.*)$", makefile, re.MULTILINE)
    words = shlex.split(line.replace("$(BIN)", str(BIN / "python")))
    built = run(["env", *words, "--site-dir", folder])
    assert built.returncode == 0, built.output
    pages = (read(file, folder) for file in folder.rglob("*.html"))
    return Site(folder, built.output, {page.address: page for page in pages})


@pytest.mark.slow
def test_no_warning_is_left(site: Site) -> None:
    kinds = {line.partition(" ")[0] for line in site.output.splitlines() if line.strip()}
    assert kinds == {"INFO"}, site.output


@pytest.mark.slow
def test_every_link_and_anchor_leads_somewhere(site: Site) -> None:
    files = {address_of(file, site.folder) for file in site.folder.rglob("*") if file.is_file()}
    assert not list(dead(site, files))


def dead(site: Site, files: set[str]) -> Iterator[tuple[str, str]]:
    """The links within the site that lead nowhere, each with its page."""
    for page in site.pages.values():
        for link in page.links:
            address, _, anchor = link.partition("#")
            if not address.startswith(HOST):
                continue
            there = site.pages.get(address)
            is_there = unquote(address) in files
            if not is_there or (there and anchor and unquote(anchor) not in there.anchors):
                yield page.address, link


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site: Site) -> None:
    loaded = {address for page in site.pages.values() for address in page.loaded}
    assert {urlsplit(address).netloc for address in loaded} == {urlsplit(HOST).netloc}
    files = {address_of(file, site.folder) for file in site.folder.rglob("*") if file.is_file()}
    assert loaded <= files
    styles = [file.read_text(encoding="utf-8") for file in site.folder.rglob("*.css")]
    asked = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", " ".join(styles))
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize("name", STATISTICS)
def test_every_statistic_has_its_page(site: Site, name: str) -> None:
    statistic = STATISTICS[name]
    page = site.at(f"statistics/{name}/")
    for said in (statistic.key, statistic.meaning, statistic.formula, statistic.source):
        assert plain(said) in page.text
    assert page.address in site.at("statistics/").links
    readers = [code for code, rule in RULES.items() if name in (*rule.statistics, *rule.evidence)]
    assert {f"{HOST}/findings/{code}/" for code in readers} <= set(page.links)


@pytest.mark.slow
def test_the_symbols_are_told(site: Site) -> None:
    told = re.split(r"(?:;|\.)\s", plain(SYMBOLS).rstrip("."))
    for page in (site.at("statistics/"), site.at("statistics/lr/")):
        assert all(each in page.text for each in told)


@pytest.mark.slow
@pytest.mark.parametrize("code", RULES)
def test_every_finding_has_its_page(site: Site, code: str) -> None:
    rule = RULES[code]
    page = site.at(f"findings/{code}/")
    for said in (rule.meaning, rule.source, *rule.definition.splitlines()):
        assert plain(said) in page.text
    for name, value in rule.settings.items():
        assert f"adam_monitor.findings.{code}.{name}={value}" in page.text
    assert page.address in site.at("findings/").links
    assert {f"{HOST}/statistics/{name}/" for name in rule.statistics} <= set(page.links)


@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_every_field_has_its_place(site: Site, topic: str) -> None:
    page = site.at(f"configuration/{topic}/")
    for section in TOPICS[topic]:
        assert plain(section.summary) in page.text
        for each in section.fields:
            assert f"{section.config.__name__}.{each.name.strip('_')}" in page.anchors
            assert section.default(each.name) in page.text
            assert plain(each.meaning) in page.text


def plain(text: str) -> str:
    """A text of the package as a page shows it."""
    return " ".join(text.replace("`", "").split())


@pytest.mark.slow
def test_every_public_name_has_its_place(site: Site) -> None:
    anchors = {
        anchor
        for page in site.pages.values()
        if page.address.startswith(f"{HOST}/api/")
        for anchor in page.anchors
    }
    public = {f"lightning_adam.{name}" for name in lightning_adam.__all__}
    public |= {f"lightning_adam.findings.rule.{name}" for name in findings.__all__}
    public |= {
        f"lightning_adam.schema.{name}"
        for name, value in vars(schema).items()
        if isinstance(value, type) and value.__module__ == schema.__name__ and name[0] != "_"
    }
    assert not public - anchors


@pytest.mark.slow
def test_examples_are_shown_as_code(site: Site) -> None:
    assert ">>> config = build_adam(" in site.at("api/training/").text


@pytest.mark.slow
def test_the_changelog_is_that_of_the_package(site: Site) -> None:
    written = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    first = next(line for line in written.splitlines() if line.startswith("## "))
    assert first.removeprefix("## ") in site.at("changelog/").text


class Silent(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def served(site: Site) -> Iterator[str]:
    """The address at which the site can be visited."""
    handler = functools.partial(Silent, directory=site.folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
def test_a_search_finds_the_page_of_a_statistic(served: str, browser: "Browser") -> None:
    page = browser.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served)
    box = page.get_by_role("textbox", name="Search")
    box.click()
    page.get_by_text("Type to start searching").wait_for()
    # It listens to keys.
    box.press_sequentially("eps_energy_loss")
    page.locator(".md-search-result__item a").first.click()
    page.get_by_role("heading", name="eps_energy_loss").wait_for()
    assert page.url.startswith(f"{served}statistics/eps_energy_loss/")
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []
    assert complaints == []
    page.close()
