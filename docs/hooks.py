"""Hooks of MkDocs: add the pages that are rendered from the package, and their navigation."""

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
# MkDocs knows this file by its path; `docs` is not installed.
sys.path.insert(0, str(REPOSITORY))

from docs.rendering import finding_pages, setting_pages, statistic_pages  # noqa: E402

RENDERED = {
    "configuration/": setting_pages,
    "findings/": finding_pages,
    "statistics/": statistic_pages,
}
"""By their placeholder in the nav of mkdocs.yml."""
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "monitor_cost.png": "benchmarks/monitor_cost.png",
    "monitor_cost_cuda.png": "benchmarks/monitor_cost_cuda.png",
}
"""Pages and pictures from outside of docs/: source paths by their paths in the site."""

LINKS = {
    "docs/": "",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Beginnings of the README's links, and of the same links in the site."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the rendered pages, and the files from outside of docs/."""
    for pages in RENDERED.values():
        for path, text in pages.pages().items():
            files.append(File.generated(config, path, content=text))
    for path, source in ELSEWHERE.items():
        files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / source)))
    files.append(File.generated(config, "index.md", content=home()))
    config.nav = in_full(config.nav)
    return files


def home() -> str:
    """Returns the README as the first page of the site, with the links of the site.

    Example:
        >>> "](guides/tune.md)" in home()
        True
    """
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for here, there in LINKS.items():
        text = text.replace(f"]({here}", f"]({there}")
    return f"---\nhide: [navigation]\n---\n\n{text}"


def in_full(entry: object) -> object:
    """Returns an entry of the nav with its placeholders replaced by pages.

    Example:
        >>> in_full(["index.md", {"Settings": ["configuration/"]}])[1]["Settings"][0]
        {'Optimizer': 'configuration/optimizer.md'}
    """
    if isinstance(entry, list):
        parts = [in_full(each) for each in entry]
        return [each for part in parts for each in (part if isinstance(part, list) else [part])]
    if isinstance(entry, dict):
        return {title: in_full(each) for title, each in entry.items()}
    return RENDERED[entry].navigation() if entry in RENDERED else entry
