"""The page as text: what is in it, what it asks nothing of, and what stands for what is missing."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_adam.dashboard.panels import SECTIONS
from lightning_adam.dashboard.report import labels, page, write_report
from lightning_adam.dashboard.runs import Run, read_runs
from lightning_adam.errors import ConfigError
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS
from lightning_adam.statistics.histograms import Histogram
from tests.dashboard.conftest import UNDEFINED, Trained
from tests.dashboard.written import KEY, run_of

VOID = {"meta", "link", "input", "img", "br", "hr"}
PANELS = [panel for panels in SECTIONS.values() for panel in panels]
EVENTS = "before it blew up"
EPS = {"generator": 1e-8, "critic": 1e-4}
NASTY = "</script><script>alert(1)</script><!-- 😀 \"'&amp; {{ 7 * 7 }}"


class Page(HTMLParser):
    """A page taken apart, as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.paragraphs: list[tuple[str | None, str]] = []
        """The class and the text of each."""
        self.terms: list[str] = []
        self.text = ""
        """All but scripts and styles."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "p":
            self.paragraphs.append((dict(attrs).get("class"), ""))
        if tag == "dt":
            self.terms.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        within = self.open[-1] if self.open else ""
        if within == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif within == "style":
            self.styles.append(data)
        else:
            self.text += data
        if "p" in self.open:
            name, text = self.paragraphs[-1]
            self.paragraphs[-1] = (name, text + data)
        if within == "dt":
            self.terms[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        (text,) = (text for attributes, text in self.scripts if attributes.get("id") == "data")

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON to a browser")

        return dict(json.loads(text, parse_constant=refuse))

    def named(self, name: str) -> list[str]:
        """The texts of the paragraphs of a class."""
        return [" ".join(text.split()) for each, text in self.paragraphs if each == name]


def page_of(*runs: Run) -> Page:
    return Page(page(runs))


@pytest.fixture(scope="module")
def runs(trained: Trained) -> dict[str, Run]:
    ((offline,), (csv,)) = (read_runs([folder]) for folder in trained)
    return {"wandb": offline, "csv": csv}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    choices = {"wandb": ["wandb"], "csv": ["csv"], "both": ["wandb", "csv"]}
    found = {}
    for name, chosen in choices.items():
        file = tmp_path_factory.mktemp("pages") / f"{name}.html"
        write_report([runs[each] for each in chosen], file)
        found[name] = Page(file.read_text(encoding="utf-8"))
    return found


KINDS = ("wandb", "csv", "both")


def unpacked(parts: dict[str, str]) -> NDArray[Any]:
    content = base64.b64decode(parts["bytes"], validate=True)
    return np.frombuffer(content, np.dtype(parts["type"]).newbyteorder("<"))


# ---- The file


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_nothing(kind: str, pages: dict[str, Page]) -> None:
    loading = ("src", "href", "srcset", "data", "action", "poster", "background")
    for tag, attributes in pages[kind].elements:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in attributes.keys() & set(loading):
            assert attributes[name] == "data:,", f"<{tag} {name}=…>"
    for style in pages[kind].styles:
        assert "url(" not in style
        assert "@import" not in style
    own = pages[kind].scripts[-1][1]
    assert not re.search(r"https?:|//cdn|fetch\(|import\(|XMLHttpRequest", own)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parts_are_there_once_and_find_each_other(kind: str, pages: dict[str, Page]) -> None:
    found = pages[kind]
    assert [attributes.get("type") for attributes, _ in found.scripts] == [
        "application/json",
        None,
        None,
    ]
    assert "plotly.js" in found.scripts[1][1][:200]
    identifiers = [each["id"] for _, each in found.elements if "id" in each]
    assert len(set(identifiers)) == len(identifiers)
    for _, attributes in found.elements:
        for name in attributes.keys() & {"aria-describedby", "aria-labelledby"}:
            assert attributes[name] in identifiers
    asked = re.findall(r'getElementById\("([^"]+)"\)', found.scripts[2][1])
    assert {"data", "legend", "theme"} <= set(asked) <= set(identifiers)


def test_a_file_that_is_there_is_replaced(runs: dict[str, Run], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("old" * 10_000_000, encoding="utf-8")
    write_report([runs["csv"]], file)
    assert file.read_text(encoding="utf-8") == page([runs["csv"]])


# ---- The numbers


@pytest.mark.parametrize("kind", KINDS)
def test_every_curve_is_the_series_of_its_run(
    kind: str, pages: dict[str, Page], runs: dict[str, Run]
) -> None:
    chosen = [runs[each] for each in (["wandb", "csv"] if kind == "both" else [kind])]
    panels = pages[kind].data["panels"]
    shown = set()
    for panel in PANELS:
        for choice in panels.get(panel.title, {}).get("choices", []):
            for line in choice["lines"]:
                suffixes = {None: [""], "model": [""]}
                scope = line["scope"]
                assert (scope is None) is (choice["label"] in ("loss", "val/loss"))
                for suffix in suffixes.get(scope, [f"/group/{scope}", f"/optimizer/{scope}"]):
                    if choice["label"] + suffix in chosen[line["run"]].series:
                        key = choice["label"] + suffix
                series = chosen[line["run"]].series[key]
                assert np.array_equal(unpacked(line["steps"]), series.steps)
                assert np.array_equal(unpacked(line["values"]), series.values, equal_nan=True)
                shown.add((line["run"], key))
    assert shown == {
        (place, key)
        for place, run in enumerate(chosen)
        for key in run.series
        if "/layer/" not in key and "/tensor/" not in key
        if key in ("loss", "val/loss") or key.split("/group/")[0] in _statistic_keys()
    }


def _statistic_keys() -> set[str]:
    return {statistic.key for statistic in STATISTICS.values()}


def test_maps_of_layers_histograms_and_the_curve_of_eps(
    pages: dict[str, Page], runs: dict[str, Run]
) -> None:
    run, panels = runs["wandb"], pages["wandb"].data["panels"]
    maps = {each["statistic"]: each for each in panels["layers"]["maps"]}
    assert maps.keys() == STATISTICS.keys() - UNDEFINED
    shown = maps["update_norm"]
    assert shown["layers"] == [
        *("net.0", "net.0.bias", "net.0.weight"),
        *("net.1", "net.1.bias", "net.1.weight"),
        *("net.3", "net.3.bias", "net.3.weight"),
    ]
    values = unpacked(shown["values"]).reshape(9, -1)
    for place, kind in ((3, "layer"), (5, "tensor")):
        series = run.series[f"{KEY}/{kind}/{shown['layers'][place]}"]
        assert np.array_equal(unpacked(shown["steps"]), series.steps)
        assert np.array_equal(values[place], series.values.astype(np.float32))
    by_step = run.histograms["adam_histogram/denominator/group/net.head"]
    (counted,) = (
        each
        for each in panels["√v̂ histogram"]["maps"]
        if (each["quantity"], each["scope"]) == ("denominator", "net.head")
    )
    assert unpacked(counted["steps"]).tolist() == sorted(by_step)
    shares = unpacked(counted["shares"]).reshape(-1, len(by_step))
    assert shares.sum(axis=0) == pytest.approx(1)
    assert counted["eps"] == [1e-8]
    (line,) = (each for each in panels["eps_curve"]["lines"] if each["scope"] == "net.head")
    assert line["step"] == max(by_step)
    last = by_step[max(by_step)]
    below = [sum(last.counts[:place]) / sum(last.counts) for place in range(1, 64)]
    assert unpacked(line["shares"]) == pytest.approx(below)
    assert unpacked(line["at"]).tolist() == [2.0**edge for edge in last.log2_edges[1:-1]]


def test_the_shown_scopes_eps_are_those_of_their_groups() -> None:
    # 0 has no place on a logarithmic axis.
    groups = {
        "decay": {"eps": 1e-8},
        "head": {"eps": 1e-4},
        "other": {"lr": 1.0},
        "bare": {"eps": 0},
    }
    config = {"lightning_adam": {"optimizer": {"param_groups": groups}}}
    counted = {0: Histogram([1, 2, 3], [-2.0, -1.0, 0.0, 1.0])}
    keys = [
        f"adam_histogram/denominator{each}"
        for each in ("", "/group/head", "/group/other", "/group/bare")
    ]
    run = Run("run", Path(), config, {}, dict.fromkeys(keys, counted), [])
    lines = page_of(run).data["panels"]["eps_curve"]["lines"]
    assert {line["scope"]: line["eps"] for line in lines} == {
        "model": [1e-8, 1e-4],
        "head": [1e-4],
        "other": [],
        "bare": [],
    }


def test_of_several_optimizers_each_has_its_own_eps() -> None:
    optimizer = {name: {"param_groups": {"all": {"eps": eps}}} for name, eps in EPS.items()}
    counted = {0: Histogram([1, 2, 3], [-2.0, -1.0, 0.0, 1.0])}
    keys = [f"adam_histogram/denominator/optimizer/{name}" for name in [*EPS, "unknown"]]
    config = {"lightning_adam": {"optimizer": optimizer}}
    run = Run("run", Path(), config, {}, dict.fromkeys(keys, counted), [])
    lines = page_of(run).data["panels"]["eps_curve"]["lines"]
    expected = {name: [eps] for name, eps in EPS.items()} | {"unknown": []}
    assert {line["scope"]: line["eps"] for line in lines} == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308])
def test_any_number_is_in_the_page_as_it_was_measured(value: float) -> None:
    run = run_of({KEY: {0: 1.0, 2**40: value}, "train/loss": {3: value}})
    panels = page_of(run).data["panels"]
    for title, key in (("update_norm", KEY), ("loss", "train/loss")):
        ((line,),) = (choice["lines"] for choice in panels[title]["choices"])
        series = run.series[key]
        assert np.array_equal(unpacked(line["values"]), series.values, equal_nan=True)
        assert np.array_equal(unpacked(line["steps"]), series.steps)


# ---- What is said


def test_what_has_no_data_is_named_with_what_to_type(pages: dict[str, Page]) -> None:
    histograms = ["eps_curve", "√v̂ histogram"]
    for kind in KINDS:
        drawn = pages[kind].data["panels"].keys()
        missing = {panel.title for panel in PANELS} - drawn
        assert missing == {*UNDEFINED, EVENTS, *(histograms if kind == "csv" else [])}
        absent = pages[kind].named("absent")
        for title in UNDEFINED:
            assert any(text.startswith(f"Not logged: {title};") for text in absent)
        assert len(absent) == len(missing)
        assert (
            f"{EVENTS}: The flight recorder has written nothing; to have it on, type for example"
            " adam_monitor.flight_recorder=200." in absent
        )
        for title in missing & set(histograms):
            assert (
                f"{title}: No histograms in the run, and a CSVLogger keeps none; log to W&B and"
                " type for example adam_monitor.histograms_every_n_steps=100." in absent
            )


def test_every_panel_is_drawn_or_named() -> None:
    found = page_of(run_of({KEY: {0: 1.0}}))
    figures = [each["data-panel"] for _, each in found.elements if "data-panel" in each]
    assert figures == ["update_norm"]
    absent = found.named("absent")
    assert "loss: Not logged; write for example self.log('train/loss', loss)." in absent
    assert (
        "update_to_weight: Not logged; type for example"
        " 'adam_monitor.statistics=[headline,update_to_weight]'." in absent
    )
    for panel in PANELS:
        named = [text for text in absent if re.search(rf"(^|[ ,]){panel.title}([:;,]|$)", text)]
        assert bool(named) is (panel.title != "update_norm")
        assert not panel.matters or any(panel.absent in text for text in named)


def test_the_panels_explain_themselves(pages: dict[str, Page]) -> None:
    found = pages["wandb"]
    drawn = [panel for panel in PANELS if panel.title in found.data["panels"]]
    text = " ".join(found.text.split())
    for panel in drawn:
        for said in (panel.meaning, panel.definition, panel.source, panel.unit):
            assert " ".join(said.split()) in text
    assert " ".join(SYMBOLS.split()) in text


def test_the_notes_are_shown() -> None:
    runs = [run_of({KEY: {0: 1.0}}, name) for name in ("a", "b")]
    runs[0].notes.extend(["first <note>", "second"])
    runs[1].notes.append("third")
    assert page_of(*runs).named("note") == ["first <note>", "second", "third"]


def test_it_says_which_optimizer_it_was(pages: dict[str, Page]) -> None:
    said = "AdamW lr=0.01 betas=[0.9,0.999] eps=1e-08 weight_decay=0.1 amsgrad=false; cosine"
    for kind in ("wandb", "csv"):
        assert said in " ".join(pages[kind].text.split())
    nothing = page_of(run_of({KEY: {0: 1.0}}))
    assert "its config does not say which optimizer" in nothing.text


def test_of_several_optimizers_it_says_each() -> None:
    optimizers = {name: {"class": "Adam", "lr": lr} for name, lr in (("gen", 0.1), ("dis", 0.2))}
    found = page_of(run_of({KEY: {0: 1.0}}, config={"lightning_adam": {"optimizer": optimizers}}))
    assert "its config does not say which optimizer" not in found.text
    for said in ("gen", "lr=0.1", "dis", "lr=0.2"):
        assert said in found.text


@pytest.mark.parametrize("ours", [None, 1, "text", [], {"optimizer": None}, {"optimizer": "adamw"}])
def test_a_config_of_another_form_says_nothing(ours: Any) -> None:
    run = run_of({KEY: {0: 1.0}}, config={"lightning_adam": ours})
    found = page_of(run, run)
    assert "its config does not say which optimizer" in found.text


# ---- Several runs


def described(name: str, lr: float, value: float, kind: str = "AdamW") -> Run:
    optimizer = {"class": kind, "lr": lr, "betas": [0.9, 0.999]}
    series = {KEY: {0: 1.0, 5: value}, f"{KEY}/layer/net.<0>": {0: 1.0, 5: value, 6: 3 * value}}
    return run_of(series, name, {"seed": 1, "lightning_adam": {"optimizer": optimizer}})


def test_a_comparison_names_the_settings_and_where_runs_part() -> None:
    runs = [described("a", 0.1, 1.0), described("b", 0.1, 1.0), described("c", 0.2, 1.05)]
    found = page_of(*runs)
    assert found.terms == ["a (lr=0.1)", "b (lr=0.1)", "c (lr=0.2)"]
    assert found.named("parting") == [
        "b (lr=0.1) measures the same as a (lr=0.1) wherever both were measured.",
        "c (lr=0.2) measures something else than a (lr=0.1) from step 5 on; nowhere are they apart"
        " by more than 10%.",
    ]
    assert re.search(r"lightning_adam\.optimizer\.lr\s*0\.1\s*0\.1\s*0\.2", found.text)
    clearly = page_of(described("a", 0.1, 1.0), described("d", 0.1, 1.5)).named("parting")
    assert clearly == [
        "d measures something else than a from step 5 on; by more than 10% for the first time at"
        " step 5, layer net.<0>: update_norm 1 there, 1.5 here."
    ]


def test_a_single_run_is_compared_with_nothing(pages: dict[str, Page]) -> None:
    for kind in KINDS:
        identifiers = [each.get("id") for _, each in pages[kind].elements]
        assert ("comparison" in identifiers) is (kind == "both")
        assert (pages[kind].named("parting") != []) is (kind == "both")


def test_the_same_training_in_two_loggers_parts_nowhere(pages: dict[str, Page]) -> None:
    (parting,) = pages["both"].named("parting")
    assert parting.endswith("wherever both were measured.")
    assert "Their configs are the same." in pages["both"].text


@given(st.lists(st.sampled_from(["a", "a #2", "a #3", "a #2 #2", "b", ""]), max_size=8))
def test_no_two_labels_are_alike(names: list[str]) -> None:
    found = labels([run_of({}, name) for name in names])
    assert len(set(found)) == len(names)
    assert all(label.startswith(name) for label, name in zip(found, names, strict=True))


def test_labels_tell_only_what_differs() -> None:
    runs = [
        described("x", 0.1, 1.0),
        described("x", 0.1, 1.0),
        described("x", 0.1, 1.0, "Adam"),
        run_of({}, "x"),
    ]
    assert labels(runs[:2]) == ["x", "x #2"]
    assert labels(runs[:3]) == ["x (class=AdamW)", "x (class=AdamW) #2", "x (class=Adam)"]
    assert labels(runs[2:])[1] == "x (class=null, lr=null, betas=null)"


# ---- Names that hold anything


def test_names_are_text_wherever_they_stand() -> None:
    def nasty(suffix: str, value: float) -> Run:
        optimizer = {"class": NASTY, "lr": NASTY + suffix, "param_groups": {NASTY: {"eps": 1.0}}}
        config = {"lightning_adam": {"optimizer": optimizer}, NASTY: suffix}
        series = {
            KEY: {0: 1.0},
            f"train/{NASTY}loss": {0: 1.0},
            f"val/{NASTY}": {0: 1.0},
            f"{KEY}/layer/{NASTY}": {0: value},
            f"{KEY}/group/{NASTY}": {0: 1.0},
        }
        run = run_of(series, NASTY + suffix, config)
        run.notes.append(NASTY)
        counted = {0: Histogram([1, 2], [0.0, 1.0, 2.0])}
        run.histograms[f"adam_histogram/denominator/group/{NASTY}"] = counted
        return run

    runs = [nasty("x", 1.0), nasty("y", 2.0)]
    plain = page_of(described("a", 0.1, 1.0), described("b", 0.2, 2.0))
    found = page_of(*runs)
    assert len(found.scripts) == len(plain.scripts) == 3
    assert found.scripts[1:] == plain.scripts[1:]
    assert "49" not in found.text
    assert found.named("note") == [NASTY] * 2
    assert all(term.startswith(NASTY) for term in found.terms)
    assert f"layer {NASTY}" in found.named("parting")[0]
    data = found.data
    assert all(label.startswith(NASTY) for label in data["runs"])
    assert data["panels"]["layers"]["maps"][0]["layers"] == [NASTY]
    assert [each["label"] for each in data["panels"]["loss"]["choices"]] == [f"train/{NASTY}loss"]
    assert NASTY in [line["scope"] for line in data["panels"]["eps_curve"]["lines"]]


def test_a_name_that_is_no_text_to_the_filesystem_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report([run_of({KEY: {0: 1.0}}, "\udcff")], file)
    assert Page(file.read_text(encoding="utf-8")).terms


# ---- What cannot be written


def test_without_any_of_our_keys_it_is_said_what_to_do(tmp_path: Path) -> None:
    runs = [run_of({"train/loss": {0: 1.0}}, name) for name in ("a", "b")]
    runs[1].notes.append("b has not ended.")
    with pytest.raises(ConfigError) as refused:
        write_report(runs, tmp_path / "report.html")
    assert str(refused.value) == (
        "a, b: expected a run with keys that begin with adam_; train with"
        " callbacks=[AdamMonitor()]. b has not ended."
    )
    assert not (tmp_path / "report.html").exists()
    write_report([*runs, run_of({KEY: {0: 1.0}})], tmp_path / "report.html")


@pytest.mark.parametrize("place", ["missing/report.html", "", "file/report.html"])
def test_a_file_that_cannot_be_written_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused:
        write_report([run_of({KEY: {0: 1.0}})], tmp_path / place)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / place}: expected a file that can be written (")
    assert said.endswith("); type for example -o report.html")
    assert "\n" not in said


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    names = ["net.10", "net.2", "net.1.b", "net.1.a", "10", "9", "net"]
    found = page_of(run_of({f"{KEY}/layer/{name}": {0: 1.0} for name in names}))
    (shown,) = found.data["panels"]["layers"]["maps"]
    assert shown["layers"] == ["9", "10", "net", "net.1.a", "net.1.b", "net.2", "net.10"]
