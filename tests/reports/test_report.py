"""The report as text: its data, its explanations, and what it says about missing data."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Severity
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.reports.keys import BASES
from lightning_adam.reports.panels import SECTIONS
from lightning_adam.reports.report import labels, write_report
from lightning_adam.reports.runs import Run, read_runs
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS
from lightning_adam.statistics.histograms import Histogram
from tests.reports.conftest import UNDEFINED, LoggedRun
from tests.reports.parsed_report import EVENTS, ParsedReport, report_of, unpacked
from tests.reports.run_files import KEY, LAYER_KEY, run_of
from tests.support.monitored import scoped
from tests.support.tables import each_row

PANELS = [panel for panels in SECTIONS.values() for panel in panels]
NASTY = "</script><script>alert(1)</script><!-- 😀 \"'&amp; {{ 7 * 7 }}"
NASTY_KEY = NASTY.replace("/", "")
"""A part of a key has no slash."""
NO_OPTIMIZER = "its config does not say which optimizer"
COUNTED = Histogram([1, 2, 3], [-2.0, -1.0, 0.0, 1.0])
SHOWN_RUNS = {"wandb": ["wandb"], "csv": ["csv"], "both": ["wandb", "csv"]}
"""The runs of each page."""


@pytest.fixture(scope="module")
def runs(logged_run: LoggedRun) -> dict[str, Run]:
    ((offline,), (csv,)) = (read_runs([folder]) for folder in logged_run)
    return {"wandb": offline, "csv": csv}


@pytest.fixture(scope="module")
def pages(
    runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ParsedReport]:
    found = {}
    for name, chosen in SHOWN_RUNS.items():
        file = tmp_path_factory.mktemp("pages") / f"{name}.html"
        write_report([runs[each] for each in chosen], file)
        found[name] = ParsedReport(file.read_text(encoding="utf-8"))
    return found


# ---- The file


def test_page_loads_nothing(pages: dict[str, ParsedReport]) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    for found in pages.values():
        for element in found.elements:
            assert element.tag not in ("iframe", "object", "embed", "base", "form")
            for name in element.attributes.keys() & loading:
                assert element.attributes[name] == "data:,", f"<{element.tag} {name}=…>"
        for style in found.all("style"):
            assert "url(" not in style.source
            assert "@import" not in style.source
        own = found.all("script")[-1].source
        assert not re.search(r"https?:|//cdn|fetch\(|import\(|XMLHttpRequest", own)


def test_parts_of_the_page_find_each_other(pages: dict[str, ParsedReport]) -> None:
    for found in pages.values():
        data, plotly, own = found.all("script")
        assert [each.attributes.get("type") for each in (data, plotly, own)] == [
            "application/json",
            None,
            None,
        ]
        assert "plotly.js" in plotly.source[:200]
        identifiers = found.values("id")
        assert len(set(identifiers)) == len(identifiers)
        for name in ("aria-describedby", "aria-labelledby"):
            assert set(found.values(name)) <= set(identifiers)
        asked = re.findall(r'getElementById\("([^"]+)"\)', own.source)
        assert {"data", "legend", "theme"} <= set(asked) <= set(identifiers)


# ---- The numbers


def test_every_curve_is_a_series_of_its_run(
    pages: dict[str, ParsedReport], runs: dict[str, Run]
) -> None:
    for kind, names in SHOWN_RUNS.items():
        chosen = [runs[each] for each in names]
        shown = set()
        for panel in PANELS:
            for choice in pages[kind].panels.get(panel.title, {}).get("choices", []):
                for line in choice["lines"]:
                    key = key_of(choice["label"], line["scope"], chosen[line["run"]])
                    series = chosen[line["run"]].series[key]
                    assert np.array_equal(unpacked(line["steps"]), series.steps)
                    assert np.array_equal(unpacked(line["values"]), series.values, equal_nan=True)
                    shown.add((line["run"], key))
        assert shown == {
            (place, key)
            for place, run in enumerate(chosen)
            for key in run.series
            if "/layer/" not in key and "/tensor/" not in key
            if key in FOREIGN_KEYS or re.sub("group/[^/]+/", "", key) in BASES
        }


FOREIGN_KEYS = ("loss", "val/accuracy", "val/loss")


def key_of(label: str, scope: str | None, run: Run) -> str:
    assert (scope is None) is (label in FOREIGN_KEYS)
    if scope in (None, "model"):
        return label
    (key,) = (
        key
        for kind in ("group", "optimizer")
        if (key := scoped(f"{kind}/{scope}", label)) in run.series
    )
    return key


def test_maps_histograms_and_the_eps_curve_show_the_numbers_of_the_run(
    pages: dict[str, ParsedReport], runs: dict[str, Run]
) -> None:
    run, panels = runs["wandb"], pages["wandb"].panels
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
        series = run.series[scoped(f"{kind}/{shown['layers'][place]}")]
        assert np.array_equal(unpacked(shown["steps"]), series.steps)
        assert np.array_equal(values[place], series.values.astype(np.float32))
    by_step = run.histograms["adam_histogram/group/net.head/denominator"]
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


def eps_by_scope(optimizer: dict[str, Any], scopes: list[str]) -> dict[str, list[float]]:
    config = {"lightning_adam": {"optimizer": optimizer}}
    keys = [f"adam_histogram/{scope}denominator" for scope in scopes]
    run = Run("run", Path(), config, {}, {key: {0: COUNTED} for key in keys}, [])
    lines = report_of(run).panels["eps_curve"]["lines"]
    return {line["scope"]: line["eps"] for line in lines}


def test_eps_of_a_scope_is_that_of_its_groups() -> None:
    # 0 has no place on a logarithmic axis.
    groups = {
        "decay": {"eps": 1e-8},
        "head": {"eps": 1e-4},
        "other": {"lr": 1.0},
        "bare": {"eps": 0},
    }
    scopes = ["", "group/head/", "group/other/", "group/bare/"]
    expected = {"model": [1e-8, 1e-4], "head": [1e-4], "other": [], "bare": []}
    assert eps_by_scope({"param_groups": groups}, scopes) == expected


def test_each_of_several_optimizers_has_its_own_eps() -> None:
    eps = {"generator": 1e-8, "critic": 1e-4}
    optimizer = {name: {"param_groups": {"all": {"eps": each}}} for name, each in eps.items()}
    scopes = [f"optimizer/{name}/" for name in (*eps, "unknown")]
    expected = {"generator": [1e-8], "critic": [1e-4], "unknown": []}
    assert eps_by_scope(optimizer, scopes) == expected


# ---- The texts


def test_panel_without_data_says_how_to_log_it(pages: dict[str, ParsedReport]) -> None:
    histograms = ["eps_curve", "√v̂ histogram"]
    for kind, found in pages.items():
        missing = {panel.title for panel in PANELS} - found.panels.keys()
        assert missing == {*UNDEFINED, EVENTS, *(histograms if kind == "csv" else [])}
        absent = found.named("absent")
        folded = re.findall(r"Not logged: ([^.]*)[.] Set", "\n".join(absent))
        titles = {title for each in folded for title in each.split(", ")}
        assert titles == UNDEFINED
        assert len(absent) == len(folded) + len(missing - UNDEFINED)
        assert (
            f"{EVENTS}: The flight recorder has written nothing. To enable it, set"
            " adam_monitor.flight_recorder=200." in absent
        )
        for title in missing & set(histograms):
            assert (
                f"{title}: The run has no histograms. Log to W&B, and set"
                " adam_monitor.histograms_every_n_steps=100." in absent
            )


def test_every_panel_is_drawn_or_named() -> None:
    found = report_of(run_of({KEY: {0: 1.0}}))
    assert found.values("data-panel") == ["update_norm"]
    absent = found.named("absent")
    for panel in PANELS:
        named = [text for text in absent if re.search(rf"(^|[ ,]){panel.title}([:.,]|$)", text)]
        assert bool(named) is (panel.title != "update_norm")
        assert not panel.matters or any(panel.absent in text for text in named)


def test_page_explains_every_panel_and_symbol(pages: dict[str, ParsedReport]) -> None:
    found = pages["wandb"]
    for panel in PANELS:
        if panel.title in found.panels:
            for text in (panel.meaning, panel.definition, panel.source, panel.unit):
                assert " ".join(text.split()) in found.text
    assert " ".join(SYMBOLS.split()) in found.text


def test_page_describes_the_optimizer(pages: dict[str, ParsedReport]) -> None:
    settings = "AdamW lr=0.01 betas=[0.9,0.999] eps=1e-08 weight_decay=0.1 amsgrad=false; cosine"
    for kind in ("wandb", "csv"):
        assert settings in pages[kind].text
    optimizers = {name: {"class": "Adam", "lr": lr} for name, lr in (("gen", 0.1), ("dis", 0.2))}
    config = {"lightning_adam": {"optimizer": optimizers}}
    found = report_of(run_of({KEY: {0: 1.0}}, config=config))
    assert NO_OPTIMIZER not in found.text
    for text in ("gen", "lr=0.1", "dis", "lr=0.2"):
        assert text in found.text


def test_page_describes_no_optimizer_where_the_config_has_another_form() -> None:
    assert NO_OPTIMIZER in report_of(run_of({KEY: {0: 1.0}})).text
    configs: list[Any] = [None, 1, "text", [], {"optimizer": None}, {"optimizer": "adamw"}]
    with each_row() as row:
        for config in configs:
            with row(config):
                run = run_of({KEY: {0: 1.0}}, config={"lightning_adam": config})
                assert NO_OPTIMIZER in report_of(run, run).text


# ---- Several runs


def described(name: str, lr: float, value: float, kind: str = "AdamW") -> Run:
    optimizer = {"class": kind, "lr": lr, "betas": [0.9, 0.999]}
    series = {
        KEY: {0: 1.0, 5: value},
        LAYER_KEY.format("net.<0>"): {0: 1.0, 5: value, 6: 3 * value},
    }
    return run_of(series, name, {"seed": 1, "lightning_adam": {"optimizer": optimizer}})


def test_comparison_names_different_settings_and_the_first_different_step() -> None:
    runs = [described("a", 0.1, 1.0), described("b", 0.1, 1.0), described("c", 0.2, 1.05)]
    found = report_of(*runs)
    assert found.texts("dt") == ["a (lr=0.1)", "b (lr=0.1)", "c (lr=0.2)"]
    assert found.named("parting") == [
        "b (lr=0.1) measures the same as a (lr=0.1) wherever both were measured.",
        "c (lr=0.2) measures something else than a (lr=0.1) from step 5 on; nowhere are they apart"
        " by more than 10%.",
    ]
    assert re.search(r"lightning_adam\.optimizer\.lr\s*0\.1\s*0\.1\s*0\.2", found.text)
    clearly = report_of(described("a", 0.1, 1.0), described("d", 0.1, 1.5)).named("parting")
    assert clearly == [
        "d measures something else than a from step 5 on; by more than 10% for the first time at"
        " step 5, layer net.<0>: update_norm 1 there, 1.5 here."
    ]


def test_two_loggers_of_one_run_show_no_difference_and_one_run_no_comparison(
    pages: dict[str, ParsedReport],
) -> None:
    (sentence,) = pages["both"].named("parting")
    assert sentence.endswith("wherever both were measured.")
    assert "Their configs are the same." in pages["both"].text
    for kind in ("wandb", "csv"):
        assert "comparison" not in pages[kind].values("id")
        assert pages[kind].named("parting") == []


@given(st.lists(st.sampled_from(["a", "a #2", "a #3", "a #2 #2", "b", ""]), max_size=8))
def test_labels_are_unique(names: list[str]) -> None:
    found = labels([run_of({}, name) for name in names])
    assert len(set(found)) == len(names)
    assert all(label.startswith(name) for label, name in zip(found, names, strict=True))


def test_labels_show_only_settings_that_differ() -> None:
    runs = [
        described("x", 0.1, 1.0),
        described("x", 0.1, 1.0),
        described("x", 0.1, 1.0, "Adam"),
        run_of({}, "x"),
    ]
    assert labels(runs[:2]) == ["x", "x #2"]
    assert labels(runs[:3]) == ["x (class=AdamW)", "x (class=AdamW) #2", "x (class=Adam)"]
    assert labels(runs[2:])[1] == "x (class=null, lr=null, betas=null)"


# ---- Unusual names


def test_names_are_never_read_as_html() -> None:
    def nasty(suffix: str, value: float) -> Run:
        optimizer = {"class": NASTY, "lr": NASTY + suffix, "param_groups": {NASTY: {"eps": 1.0}}}
        config = {"lightning_adam": {"optimizer": optimizer}, NASTY: suffix}
        series = {
            KEY: {0: 1.0},
            f"train/{NASTY}loss": {0: 1.0},
            f"val/{NASTY}": {0: 1.0},
            scoped(f"layer/{NASTY_KEY}"): {0: value},
            scoped(f"group/{NASTY_KEY}"): {0: 1.0},
        }
        run = run_of(series, NASTY + suffix, config)
        run.notes.append(NASTY)
        counted = {0: Histogram([1, 2], [0.0, 1.0, 2.0])}
        run.histograms[f"adam_histogram/group/{NASTY_KEY}/denominator"] = counted
        return run

    runs = [nasty("x", 1.0), nasty("y", 2.0)]
    plain = report_of(described("a", 0.1, 1.0), described("b", 0.2, 2.0))
    found = report_of(*runs)
    scripts = found.all("script")
    assert len(scripts) == 3
    assert [each.source for each in scripts[1:]] == [
        each.source for each in plain.all("script")[1:]
    ]
    assert "49" not in found.text
    assert found.named("note") == [NASTY] * 2
    assert all(term.startswith(NASTY) for term in found.texts("dt"))
    assert f"layer {NASTY_KEY}" in found.named("parting")[0]
    data = found.data
    assert all(label.startswith(NASTY) for label in data["runs"])
    assert data["panels"]["layers"]["maps"][0]["layers"] == [NASTY_KEY]
    assert [each["label"] for each in data["panels"]["loss"]["choices"]] == [f"train/{NASTY}loss"]
    assert NASTY_KEY in [line["scope"] for line in data["panels"]["eps_curve"]["lines"]]


def test_name_that_is_no_valid_unicode_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report([run_of({KEY: {0: 1.0}}, "\udcff")], file)
    assert ParsedReport(file.read_text(encoding="utf-8")).texts("dt")


# ---- Refusals


def test_runs_without_keys_of_the_monitor_raise(tmp_path: Path) -> None:
    runs = [run_of({"train/loss": {0: 1.0}}, name) for name in ("a", "b")]
    runs[1].notes.append("b has not ended.")
    with pytest.raises(ConfigError) as raised:
        write_report(runs, tmp_path / "report.html")
    assert str(raised.value) == (
        "a, b: no run has keys that begin with adam_. Train with callbacks=[AdamMonitor()]."
        " b has not ended"
    )
    assert not (tmp_path / "report.html").exists()
    write_report([*runs, run_of({KEY: {0: 1.0}})], tmp_path / "report.html")


def test_file_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with each_row() as row:
        for place in ("missing/report.html", "", "file/report.html"):
            with row(place):
                with pytest.raises(ConfigError) as raised:
                    write_report([run_of({KEY: {0: 1.0}})], tmp_path / place)
                sentence = str(raised.value)
                assert sentence.startswith(f"{tmp_path / place} cannot be written: ")
                assert sentence.endswith(". Use for example -o report.html")
                assert "\n" not in sentence


def test_layers_are_sorted_by_their_numbers() -> None:
    names = ["net.10", "net.2", "net.1.b", "net.1.a", "10", "9", "net"]
    found = report_of(run_of({LAYER_KEY.format(name): {0: 1.0} for name in names}))
    (shown,) = found.panels["layers"]["maps"]
    assert shown["layers"] == ["9", "10", "net", "net.1.a", "net.1.b", "net.2", "net.10"]


def test_largest_values_are_curves_that_name_their_tensors() -> None:
    worst = scoped("worst_1")
    run = run_of({KEY: {0: 1.0}, worst: {0: 2.0, 1: 4.0, 2: 3.0}})
    run.tensors[worst] = {0: "net.0.weight", 1: "net.1.bias", 2: "net.0.weight"}
    (choice,) = report_of(run).panels["update_norm"]["choices"]
    model, largest = choice["lines"]
    assert (model["scope"], largest["scope"]) == ("model", "worst 1")
    assert "tensors" not in model
    names, places = largest["tensors"]["names"], largest["tensors"]["places"]
    assert [names[place] for place in places] == ["net.0.weight", "net.1.bias", "net.0.weight"]


def test_finding_is_listed_and_marked_at_its_step() -> None:
    def finding(code: str, step: int, severity: Severity) -> Finding:
        return Finding(code, severity, "model", step, f"sentence {step}", {}, {}, (), "source")

    found = [
        finding("eps_dominates", 8, Severity.warning),
        finding("eps_dominates", 12, Severity.warning),
        finding("update_lost", 4, Severity.info),
    ]
    report = report_of(replace(run_of({KEY: {0: 1.0}}), findings=found))
    for text in ("eps_dominates", "sentence 8", "sentence 12", "from step 8", "sentence 4"):
        assert text in report.text
    # The axis counts steps from 0, and an info is no mark.
    marks = [(mark["code"], mark["step"]) for mark in report.data["findings"]]
    assert marks == [("eps_dominates", 7)]


def test_marks_of_a_second_optimizer_are_kept() -> None:
    first = Finding("eps_dominates", Severity.error, "model", 8, "", {}, {}, (), "", "encoder")
    found = [first, replace(first, optimizer="decoder", step=12), replace(first, step=0)]
    report = report_of(replace(run_of({KEY: {0: 1.0}}), findings=found))
    marks = [(mark["code"], mark["step"]) for mark in report.data["findings"]]
    assert marks == [("eps_dominates of encoder", 7), ("eps_dominates of decoder", 11)]


def test_suggestions_keep_their_order() -> None:
    suggestions = (
        Suggestion(hint="inspect the batches", is_lead=True),
        Suggestion(("optimizer.lr=0.1,1",), is_lead=True, is_sweep=True),
        Suggestion(("optimizer.eps=1e-10",)),
    )
    finding = Finding("loss_spike", Severity.warning, "model", 8, "", {}, {}, suggestions, "")
    report = report_of(replace(run_of({KEY: {0: 1.0}}), findings=[finding]))
    expected = "lead: inspect the batches lead: --multirun optimizer.lr=0.1,1 type optimizer.eps="
    assert expected in " ".join(report.text.split())
