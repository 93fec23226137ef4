"""Text of the package on the site: escaped, with links for names and papers."""

import functools
import re

import markdown
import yaml

from docs.rendering import finding_pages, setting_pages, statistic_pages
from docs.rendering.text import code, definitions, plain, prose, table
from lightning_adam.findings import RULES
from lightning_adam.findings.describe import suggestion_summary
from lightning_adam.findings.preflight import NOTICES
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support.commands import REPOSITORY
from tests.support.html_page import HtmlPage
from tests.support.tables import each_row

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
LINKS = {
    "see rms_ratio.": "../statistics/rms_ratio.md",
    "see `eps_dominates`": "../findings/eps_dominates.md",
    "as eps_vanishes": "../findings/eps_vanishes.md",
    "alg. 1 of arXiv 1412.6980": "https://arxiv.org/abs/1412.6980",
    "2506.04805; calibrated": "https://arxiv.org/abs/2506.04805",
    "pytorch/pytorch issue 147437": "https://github.com/pytorch/pytorch/issues/147437",
    # Ambiguous words.
    "the step": None,
    "`weight_decay`": None,
    "decay_timescale": None,
    "1e-8 or 0.00001": None,
}


@functools.cache
def extensions() -> dict[str, dict[str, object]]:
    configured = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = configured["markdown_extensions"]
    return {
        name: settings
        for entry in entries
        for name, settings in (entry.items() if isinstance(entry, dict) else [(entry, {})])
    }


def rendered(text: str) -> HtmlPage:
    configs = extensions()
    page = markdown.markdown(text, extensions=[*configs], extension_configs=configs)
    return HtmlPage(str(page))


def tags(page: HtmlPage) -> list[str]:
    return [each.tag for each in page.elements]


def test_text_is_escaped() -> None:
    with each_row() as row:
        for text in HOSTILE:
            with row(text):
                for made, expected in (
                    (prose(text), ["p"]),
                    (plain(text), ["p"]),
                    (code(text), ["p", "code"]),
                ):
                    page = rendered(made)
                    assert (tags(page), page.text) == (expected, text)
                cells = rendered(table(["a", "b"], [[code(text), prose(text)]])).texts("td")
                assert cells == [text, text]
                page = rendered(definitions([(plain(text), prose(text)), ("left out", "")]))
                assert tags(page) == ["dl", "dt", "dd"]
                assert page.text == f"{text} {text}"


def test_names_and_papers_are_links_and_other_words_are_not() -> None:
    with each_row() as row:
        for text, address in LINKS.items():
            with row(text):
                page = rendered(prose(text))
                assert page.values("href") == ([address] if address else [])
                assert page.text == text.replace("`", "")


def test_page_of_a_statistic_shows_its_key_formula_and_meaning() -> None:
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                page = rendered(statistic_pages.of(statistic)).text
                for text in (statistic.key, statistic.formula, statistic.meaning):
                    assert text in page


def test_page_of_a_finding_shows_its_suggestions_by_example() -> None:
    with each_row() as row:
        for name, rule in (RULES | NOTICES).items():
            with row(name):
                lines = {
                    dtype: finding_pages.example(rule, dtype) for dtype in finding_pages.PRECISIONS
                }
                assert bool(lines["bfloat16"]) == bool(suggestion_summary(rule))
                each = [line for of_dtype in lines.values() for line in of_dtype]
                assert all(re.match(r"(use|try|do): ", line) for line in each)
                text = rendered(finding_pages.page_of(rule)).text
                shown = [" ".join(line.split()) for line in lines["bfloat16"]]
                assert [line for line in shown if line not in text] == []


def test_every_fault_of_the_clinic_belongs_to_a_finding() -> None:
    options = {file.stem for file in finding_pages.FAULTS.glob("*.yaml")} - {"none"}
    assert {option for option, _ in finding_pages.faults().values()} == options


def test_page_of_settings_explains_values_and_types() -> None:
    page = rendered(setting_pages.of("optimizer")).text
    assert "matrices: Parameters with at least two dimensions" in page
    assert "optimizer.betas=[0.9,0.999] of type list[float]" in page
