"""What is rendered for the site: no text of the package is markup, names and papers are links."""

import functools
import html
import re

import markdown
import pytest
import yaml

from docs.rendering import finding_pages, setting_pages, statistic_pages
from docs.rendering.text import code, definitions, plain, prose, table
from lightning_adam.findings import RULES
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.commands import REPOSITORY

HOSTILE = (
    "max |u| < *x* & _y_ or __z__",
    "[a](b) and [c][d] and ![e](f)",
    "<b>bold</b> &lt; {h} \\d",
    "- no list",
    "1. nor this",
    "# no title {#id}",
    "> no quote",
    "~~i~~ ==j== ^k^ $l$ :m: \"n\" 'o'",
)


@functools.cache
def extensions() -> dict[str, dict[str, object]]:
    """The site's own extensions of Markdown, and what is set of them."""
    configured = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = configured["markdown_extensions"]
    return {
        name: settings
        for entry in entries
        for name, settings in (entry.items() if isinstance(entry, dict) else [(entry, {})])
    }


def rendered(text: str) -> str:
    """Markdown as the site renders it."""
    configs = extensions()
    return str(markdown.markdown(text, extensions=[*configs], extension_configs=configs))


def tags(page: str) -> list[str]:
    return re.findall(r"<(\w+)", page)


def shown(page: str) -> str:
    """What a reader sees of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_text_is_markup(text: str) -> None:
    for made in (prose(text), plain(text)):
        page = rendered(made)
        assert tags(page) == ["p"]
        assert shown(page) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_code_is_markup(text: str) -> None:
    page = rendered(code(text))
    assert tags(page) == ["p", "code"]
    assert shown(page) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_and_a_definition_hold_any_text(text: str) -> None:
    cells = re.findall(r"<td>(.*?)</td>", rendered(table(["a", "b"], [[code(text), prose(text)]])))
    assert [shown(cell) for cell in cells] == [text, text]
    page = rendered(definitions([(plain(text), prose(text)), ("left out", "")]))
    assert tags(page) == ["dl", "dt", "dd"]
    assert shown(page) == f"{text} {text}"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("see exp_avg_sq_lag.", "../statistics/exp_avg_sq_lag.md"),
        ("see `eps_dominates`", "../findings/eps_dominates.md"),
        ("alg. 1 of arXiv 1412.6980", "https://arxiv.org/abs/1412.6980"),
        ("2506.04805; calibrated", "https://arxiv.org/abs/2506.04805"),
        ("pytorch/pytorch issue 147437", "https://github.com/pytorch/pytorch/issues/147437"),
    ],
)
def test_names_and_papers_are_links(text: str, address: str) -> None:
    page = rendered(prose(text))
    assert re.findall(r'href="([^"]*)"', page) == [address]
    assert shown(page) == text.replace("`", "")


@pytest.mark.parametrize(
    "text", ["the step", "`weight_decay`", "decay_timescale", "1e-8 or 0.00001"]
)
def test_what_may_mean_something_else_is_no_link(text: str) -> None:
    assert "href" not in rendered(prose(text))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_told_as_it_is_written(name: str) -> None:
    page = shown(rendered(statistic_pages.of(STATISTICS[name])))
    for said in (STATISTICS[name].key, STATISTICS[name].formula, STATISTICS[name].meaning):
        assert said in page


@pytest.mark.parametrize("name", RULES)
def test_a_remedy_is_shown_for_every_finding(name: str) -> None:
    for dtype in finding_pages.PRECISIONS:
        lines = finding_pages.example(RULES[name], dtype)
        assert lines
        assert all(re.match(r"(or )?(type|do):", line) for line in lines)


def test_every_fault_of_the_clinic_is_of_a_finding() -> None:
    options = {file.stem for file in finding_pages.FAULTS.glob("*.yaml")} - {"none"}
    assert {option for option, _ in finding_pages.faults().values()} == options


def test_the_words_of_a_setting_are_told() -> None:
    page = shown(rendered(setting_pages.of("optimizer")))
    assert "matrices: Parameters of two or more dimensions" in page
    assert "optimizer.betas=[0.9,0.999] of type list[float]" in page
