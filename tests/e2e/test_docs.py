"""The documentation's site: no dead links, no foreign resources, and a place for everything."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import lightning_adam
from lightning_adam import findings
from lightning_adam.config import monitor, optimizer, schedule, tune
from lightning_adam.config.explain import TOPICS
from lightning_adam.findings import RULES
from lightning_adam.findings.describe import format_condition
from lightning_adam.findings.preflight import NOTICES
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS
from tests.support.commands import REPOSITORY
from tests.support.html_page import HtmlPage
from tests.support.site import Site, built_site
from tests.support.tables import each_row

pytestmark = pytest.mark.slow

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
"""The elements that a browser loads by itself, and the attribute with the address."""


@dataclass
class SitePage:
    """A page of the site."""

    address: str
    text: str
    links: list[str]
    loaded: list[str]
    anchors: set[str]


def read(file: Path, folder: Path) -> SitePage:
    address = address_of(file, folder)
    page = HtmlPage(file.read_text(encoding="utf-8"))
    links = [each.attributes["href"] for each in page.all("a") if "href" in each.attributes]
    loaded = [each.attributes.get(LOADED.get(each.tag, ""), "") for each in page.elements]
    return SitePage(
        address,
        page.text,
        links=[urljoin(address, link) for link in links],
        loaded=[urljoin(address, each) for each in loaded if each and each[:5] != "data:"],
        anchors={*page.values("id"), *page.values("name")} - {""},
    )


def address_of(file: Path, folder: Path) -> str:
    path = file.relative_to(folder).as_posix().removesuffix("index.html")
    return f"{HOST}/{path}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return built_site(tmp_path_factory)


@pytest.fixture(scope="module")
def pages(site: Site) -> dict[str, SitePage]:
    """The pages by their paths."""
    found = [read(file, site.folder) for file in site.folder.rglob("*.html")]
    return {page.address.removeprefix(f"{HOST}/"): page for page in found}


@pytest.fixture(scope="module")
def addresses(site: Site) -> set[str]:
    """The addresses of all files."""
    return {address_of(file, site.folder) for file in site.folder.rglob("*") if file.is_file()}


def plain(text: str) -> str:
    """Returns a text of the package as a page shows it."""
    return " ".join(text.replace("`", "").split())


def test_site_is_built_without_warnings(site: Site) -> None:
    kinds = {line.partition(" ")[0] for line in site.output.splitlines() if line.strip()}
    assert kinds == {"INFO"}, site.output


def test_every_link_and_anchor_leads_somewhere(
    pages: dict[str, SitePage], addresses: set[str]
) -> None:
    assert list(dead_links(pages, addresses)) == []


def dead_links(pages: dict[str, SitePage], addresses: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the links within the site that lead nowhere, each with its page."""
    for page in pages.values():
        for link in page.links:
            address, _, anchor = link.partition("#")
            if not address.startswith(HOST):
                continue
            target = pages.get(address.removeprefix(f"{HOST}/"))
            exists = unquote(address) in addresses
            if not exists or (target and anchor and unquote(anchor) not in target.anchors):
                yield page.address, link


def test_pages_load_nothing_from_another_host(
    site: Site, pages: dict[str, SitePage], addresses: set[str]
) -> None:
    loaded = {address for page in pages.values() for address in page.loaded}
    assert {urlsplit(address).netloc for address in loaded} == {urlsplit(HOST).netloc}
    assert loaded <= addresses
    styles = [file.read_text(encoding="utf-8") for file in site.folder.rglob("*.css")]
    asked = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", " ".join(styles))
    assert not asked


def test_every_statistic_has_a_page(pages: dict[str, SitePage]) -> None:
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                page = pages[f"statistics/{name}/"]
                for text in (statistic.key, statistic.meaning, statistic.formula, statistic.source):
                    assert plain(text) in page.text
                assert page.address in pages["statistics/"].links
                readers = [
                    f"{HOST}/findings/{code}/"
                    for code, rule in RULES.items()
                    if name in (*rule.statistics, *rule.evidence)
                ]
                assert {*readers} <= set(page.links)


def test_every_symbol_is_explained(pages: dict[str, SitePage]) -> None:
    symbols = re.split(r"(?:;|\.)\s", plain(SYMBOLS).rstrip("."))
    for page in (pages["statistics/"], pages["statistics/lr/"]):
        assert [symbol for symbol in symbols if symbol not in page.text] == []


def test_every_finding_and_notice_has_a_page(pages: dict[str, SitePage]) -> None:
    with each_row() as row:
        for code, rule in (RULES | NOTICES).items():
            with row(code):
                page = pages[f"findings/{code}/"]
                for text in (rule.meaning, rule.source):
                    assert plain(text) in page.text
                for name, value in rule.settings.items():
                    assert f"adam_monitor.findings.{code}.{name}={value}" in page.text
                assert page.address in pages["findings/"].links
        for code, finding in RULES.items():
            with row(code):
                assert plain(format_condition(finding)) in pages[f"findings/{code}/"].text
                links = {f"{HOST}/statistics/{name}/" for name in finding.statistics}
                assert links <= set(pages[f"findings/{code}/"].links)


def test_every_config_field_is_documented(pages: dict[str, SitePage]) -> None:
    with each_row() as row:
        for topic, sections in TOPICS.items():
            page = pages[f"configuration/{topic}/"]
            for section in sections:
                with row(section.config.__name__):
                    assert plain(section.summary) in page.text
                for each in section.fields:
                    with row(f"{section.config.__name__}.{each.name}"):
                        anchor = f"{section.config.__name__}.{each.name.strip('_')}"
                        assert anchor in page.anchors
                        assert section.default(each.name) in page.text
                        assert plain(each.meaning) in page.text


def test_every_public_name_is_documented(pages: dict[str, SitePage]) -> None:
    api = [page for path, page in pages.items() if path.startswith("api/")]
    public = {f"lightning_adam.{name}" for name in lightning_adam.__all__}
    public |= {
        f"{value.__module__}.{name}" if callable(value) else f"lightning_adam.findings.rule.{name}"
        for name, value in vars(findings).items()
        if name in findings.__all__
    }
    for module in (optimizer, schedule, monitor, tune):
        configs = {
            f"{module.__name__}.{name}"
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        }
        assert configs
        public |= configs
    public |= {f"lightning_adam.config.errors.{name}" for name in ("ConfigPath", "Source")}
    assert not public - {anchor for page in api for anchor in page.anchors}


def test_examples_and_changelog_are_shown(pages: dict[str, SitePage]) -> None:
    assert ">>> config = build_adam(" in pages["api/training/"].text
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert heading.removeprefix("## ") in pages["changelog/"].text
