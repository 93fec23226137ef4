"""The page of a report: summary, data, explanations and notes."""

import base64
import gzip
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_adam.config.errors import ConfigError
from lightning_adam.findings import RULES
from lightning_adam.findings.finding import Finding, Suggestion
from lightning_adam.reports.charts import SECTIONS, ChartKind
from lightning_adam.reports.keys import BASES
from lightning_adam.reports.report import MAX_PINNED_METRICS, MAX_TIMES, labels, write_report
from lightning_adam.reports.runs import Event, Run, Series, read_runs
from lightning_adam.reports.summary import CHECKPOINT
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS
from lightning_adam.statistics.histograms import PERCENTILE_FAMILIES, Histogram
from tests.reports.conftest import UNDEFINED, LoggedRun
from tests.reports.parsed_report import ParsedReport, report_of, unpack
from tests.reports.run_files import KEY, LAYER_KEY, run_of
from tests.support.findings import finding
from tests.support.monitored import scoped
from tests.support.tables import each_row

CHARTS = [chart for charts in SECTIONS.values() for chart in charts]
NASTY = "</script><script>alert(1)</script><!-- 😀 \"'&amp; {{ 7 * 7 }}"
NASTY_KEY = NASTY.replace("/", "")
"""Parts of a key contain no slash."""
NO_OPTIMIZER = "The config of the run has no optimizer."
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
                assert element.attributes[name].startswith(("data:,", "#")), element.tag
        for style in found.all("style"):
            assert "url(" not in style.source
            assert "@import" not in style.source
        own = found.all("script")[-1].source
        assert not re.search(r"https?:|//cdn|fetch\(|import\(|XMLHttpRequest", own)


def test_references_within_the_page_exist(pages: dict[str, ParsedReport]) -> None:
    for found in pages.values():
        scripts = found.all("script")
        assert [each.attributes["type"] for each in scripts] == [
            *("application/json", "application/gzip", "module")
        ]
        plotly = gzip.decompress(base64.b64decode(scripts[1].source, validate=True))
        assert b"plotly.js" in plotly[:200]
        identifiers = found.values("id")
        assert len(set(identifiers)) == len(identifiers)
        for name in ("aria-describedby", "aria-labelledby"):
            assert set(found.values(name)) <= set(identifiers)
        assert {link.removeprefix("#") for link in found.values("href")} <= {*identifiers, "data:,"}
        asked = re.findall(r'(?:getElementById|getElement)\("([^"]+)"\)', scripts[2].source)
        assert {"data", "plotly", "legend", "theme"} <= set(asked) <= set(identifiers)


# ---- The numbers


def test_every_curve_is_a_series_of_its_run(
    pages: dict[str, ParsedReport], runs: dict[str, Run]
) -> None:
    for kind, names in SHOWN_RUNS.items():
        chosen = [runs[each] for each in names]
        shown = set()
        for name, chart in pages[kind].charts.items():
            for line in chart["lines"] if chart["kind"] == "curves" else []:
                key = key_of(name, line, chosen[line["run"]])
                series = chosen[line["run"]].series[key]
                assert np.array_equal(unpack(line["steps"]), series.steps)
                values = unpack(line["values"])
                assert np.array_equal(values, series.values.astype(values.dtype), equal_nan=True)
                shown.add((line["run"], key))
        assert shown == {
            (place, key)
            for place, run in enumerate(chosen)
            for key in run.series
            if "/layer/" not in key and "/tensor/" not in key
            if key in FOREIGN_KEYS or re.sub("group/[^/]+/", "", key) in BASES
        }


FOREIGN_KEYS = ("loss", "val/accuracy", "val/loss")
TENSORS = [f"net.{number}.{name}" for number in (0, 1, 3) for name in ("bias", "weight")]


def key_of(chart: str, line: dict[str, Any], run: Run) -> str:
    assert (line["scope"] is None) is (chart in FOREIGN_KEYS)
    if line["scope"] is None:
        return chart
    quantity = chart.removesuffix("_percentiles")
    base = (
        STATISTICS[chart].key
        if chart in STATISTICS
        else f"adam_{PERCENTILE_FAMILIES[quantity]}/{quantity}_{line['part']}"
    )
    return base if line["scope"] == "model" else scoped(f"group/{line['scope']}", base)


def test_maps_histograms_and_the_eps_curve_show_the_numbers_of_the_run(
    pages: dict[str, ParsedReport], runs: dict[str, Run]
) -> None:
    run, charts = runs["wandb"], pages["wandb"].charts
    maps = {(each["statistic"], each["scope"]): each for each in charts["layers"]["maps"]}
    assert {statistic for statistic, _ in maps} == STATISTICS.keys() - UNDEFINED
    for kind, names in (("layer", ["net.0", "net.1", "net.3"]), ("tensor", TENSORS)):
        shown = maps["update_norm", f"{kind}s"]
        assert shown["layers"] == names
        values = unpack(shown["values"]).reshape(len(names), -1)
        for name, row in zip(names, values, strict=True):
            series = run.series[scoped(f"{kind}/{name}")]
            assert np.array_equal(unpack(shown["steps"]), series.steps)
            assert np.array_equal(row, series.values.astype(np.float32))
    by_step = run.histograms["adam_histogram/group/net.head/denominator"]
    (counted,) = (
        each
        for each in charts["histogram"]["maps"]
        if (each["quantity"], each["scope"]) == ("denominator", "net.head")
    )
    assert unpack(counted["steps"]).tolist() == sorted(by_step)
    shares = unpack(counted["shares"]).reshape(-1, len(by_step))
    assert shares.sum(axis=0) == pytest.approx(1)
    assert counted["eps"] == [1e-8]
    (line,) = (each for each in charts["eps_curve"]["lines"] if each["scope"] == "net.head")
    assert line["step"] == max(by_step)
    last = by_step[max(by_step)]
    below = [sum(last.counts[:place]) / sum(last.counts) for place in range(1, 65)]
    assert line["shares"] == pytest.approx(below)
    assert line["magnitudes"] == [2.0**edge for edge in last.log2_edges[1:]]


def eps_by_scope(optimizer: dict[str, Any], scopes: list[str]) -> dict[str, list[float]]:
    config = {"lightning_adam": {"optimizer": optimizer}}
    keys = [f"adam_histogram/{scope}denominator" for scope in scopes]
    run = Run("run", Path(), config, {}, {key: {0: COUNTED} for key in keys}, [])
    lines = report_of(run).charts["eps_curve"]["lines"]
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


def test_chart_without_data_explains_how_to_log_it(pages: dict[str, ParsedReport]) -> None:
    histograms = ["eps_curve", "histogram"]
    titles = {chart.id: chart.title for chart in CHARTS}
    for kind, found in pages.items():
        missing = titles.keys() - {"loss", "validation"} - found.charts.keys()
        assert missing == {*UNDEFINED, "events", *(histograms if kind == "csv" else [])}
        absent = found.named("absent")
        (unseen,) = re.findall(r"Not logged: ([^.]*)[.] To", "\n".join(absent))
        assert set(unseen.split(", ")) == UNDEFINED
        assert (
            "Last steps before the failure: No recording. Set adam_monitor.flight_recorder=200."
            in absent
        )
        for name in missing & set(histograms):
            assert (
                f"{titles[name]}: No histograms. Log to W&B or TensorBoard, and set"
                " adam_monitor.histograms_every_n_steps=100." in absent
            )


def test_every_chart_is_drawn_or_listed() -> None:
    found = report_of(run_of({KEY: {0: 1.0}}))
    assert found.values("data-chart") == ["update_norm"]
    absent = "\n".join(found.named("absent"))
    for chart in CHARTS:
        if chart.kind is ChartKind.CURVES and not chart.is_pinned and chart.id not in STATISTICS:
            # Percentiles are omitted, as the histogram is listed.
            continue
        is_named = re.search(rf"(^|[ ,]){re.escape(chart.title)}([:.,]|$)", absent, re.MULTILINE)
        assert bool(is_named) is (chart.id != "update_norm"), chart.id
    for chart in CHARTS:
        assert chart.id in STATISTICS or not chart.is_pinned or chart.missing in absent
    of_checkpoint = report_of(replace(run_of({KEY: {0: 1.0}}), source=CHECKPOINT))
    assert of_checkpoint.named("absent") == ["No chart matches the search."]


def test_page_explains_every_chart_and_symbol(pages: dict[str, ParsedReport]) -> None:
    found = pages["wandb"]
    for chart in CHARTS:
        if chart.id in found.charts:
            for text in (chart.meaning, chart.definition, chart.source, chart.unit):
                assert " ".join(text.split()) in found.text
    assert " ".join(SYMBOLS.split()) in found.text


def test_page_describes_the_run(pages: dict[str, ParsedReport]) -> None:
    settings = "AdamW lr=0.01 betas=[0.9,0.999] eps=1e-08 weight_decay=0.1 amsgrad=false; cosine"
    for found in pages.values():
        assert settings in found.text
    run = replace(run_of({KEY: {0: 1.0}}), findings=[], measurements=3, seconds=90.0)
    run.notes.append("The file ends early.")
    found = report_of(run)
    assert found.named("verdict") == ["Healthy run no issues found in 3 measurements"]
    assert (found.texts("dt"), found.texts("dd")) == (
        ["Last step", "Wall time"],
        ["0", "1 min 30 s"],
    )
    assert found.named("note") == ["The file ends early."]
    assert NO_OPTIMIZER in found.text
    assert NO_OPTIMIZER not in pages["csv"].text


def test_each_metric_of_the_module_has_its_own_chart() -> None:
    names = [f"val/{name}" for name in ("zeta", "accuracy", "loss", "b", "c")]
    series = {name: {0: 1.0} for name in [KEY, "train/loss", "train/aux_loss", *names]}
    found = report_of(run_of(series))
    own = [each for each in found.values("data-chart") if each != "update_norm"]
    # The metric that the run is judged by comes first, the others by name.
    assert own == ["train/loss", "train/aux_loss"] + [
        f"val/{name}" for name in ("loss", "accuracy", "b", "c", "zeta")
    ]
    folded = found.all("details", "more")[0].inner("figure")
    assert [each.attributes["data-chart"] for each in folded] == own[2 + MAX_PINNED_METRICS :]
    assert [found.charts[each]["title"] for each in own] == own
    # A run may be judged by a metric of any name.
    judged = {"lightning_adam": {"run": {"metric": {"name": "zeta", "mode": "max"}}}}
    found = report_of(
        run_of({name: {0: 1.0} for name in (KEY, "zeta", "val/loss", "eta")}, config=judged)
    )
    assert [each for each in found.values("data-chart") if each != "update_norm"] == [
        "zeta",
        "val/loss",
    ]


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
    assert found.named("difference") == [
        "b (lr=0.1) equals a (lr=0.1) at all common steps.",
        "c (lr=0.2) first differs from a (lr=0.1) at step 5, but never by more than 10%.",
    ]
    assert re.search(r"lightning_adam\.optimizer\.lr\s*0\.1\s*0\.1\s*0\.2", found.text)
    clearly = report_of(described("a", 0.1, 1.0), described("d", 0.1, 1.5)).named("difference")
    assert clearly == [
        "d first differs from a at step 5, and by more than 10% at step 5, layer net.<0>:"
        " update_norm 1.5, not 1."
    ]


def test_summary_of_several_runs_has_a_row_for_each() -> None:
    first, second = (described(name, 0.1, 1.0) for name in "ab")
    second = replace(second, findings=[finding()], seconds=5.0)
    found = report_of(replace(first, findings=[]), second)
    rows = found.all("table", "summary")[0].inner("tr")
    assert [[" ".join(cell.text.split()) for cell in row.inner("th", "td")] for row in rows] == [
        ["run", "verdict", "Last step", "Wall time", "optimizer"],
        ["a", "Healthy no issues found", "6", "", "AdamW lr=0.1 betas=[0.9,0.999]"],
        ["b", "1 warning 1 open at the end", "6", "5 s", "AdamW lr=0.1 betas=[0.9,0.999]"],
    ]


def test_two_loggers_of_one_run_show_no_difference_and_one_run_no_comparison(
    pages: dict[str, ParsedReport],
) -> None:
    (sentence,) = pages["both"].named("difference")
    assert sentence.endswith("at all common steps.")
    assert "The configs are the same." in pages["both"].text
    for kind in ("wandb", "csv"):
        assert "comparison" not in pages[kind].values("id")
        assert pages[kind].named("difference") == []


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


def test_names_are_escaped() -> None:
    def nasty(suffix: str, value: float) -> Run:
        optimizer = {"class": NASTY, "lr": NASTY + suffix, "param_groups": {NASTY: {"eps": 1.0}}}
        facts = {"device": NASTY, "metric": {"name": f"val/{NASTY}", "mode": "min"}}
        config = {"lightning_adam": {"optimizer": optimizer, "run": facts}, NASTY: suffix}
        series = {
            KEY: {0: 1.0},
            f"train/{NASTY}loss": {0: 1.0},
            f"val/{NASTY}": {0: 1.0},
            scoped(f"layer/{NASTY_KEY}"): {0: value},
            scoped(f"group/{NASTY_KEY}"): {0: 1.0},
        }
        run = run_of(series, NASTY + suffix, config)
        run.notes.append(NASTY)
        run.events.append(Event(3, NASTY, run.series))
        counted = {0: Histogram([1, 2], [0.0, 1.0, 2.0])}
        run.histograms[f"adam_histogram/group/{NASTY_KEY}/denominator"] = counted
        suggestion = Suggestion((f"{NASTY}=1",), NASTY)
        found = finding(NASTY, scope=f"layer/{NASTY}", sentence=NASTY, suggestions=(suggestion,))
        shown = replace(found, evidence={NASTY: 1.0}, worst={NASTY: 1.0}, source=NASTY)
        return replace(run, findings=[shown, replace(found, optimizer=NASTY, superseded_by=NASTY)])

    runs = [nasty("x", 1.0), nasty("y", 2.0)]
    plain = report_of(described("a", 0.1, 1.0), described("b", 0.2, 2.0))
    for shown in (runs, runs[:1]):
        found = report_of(*shown)
        scripts = found.all("script")
        assert len(scripts) == 3
        assert [each.source for each in scripts[1:]] == [
            each.source for each in plain.all("script")[1:]
        ]
        assert "49" not in found.text
        assert found.named("note") == [NASTY] * len(shown)
        for place, name in (
            ("h3", f"{NASTY} warning"),
            ("code", Suggestion((f"{NASTY}=1",)).command),
            ("cite", NASTY),
        ):
            assert sum(text == " ".join(name.split()) for text in found.texts(place)) > 0, place
        data = found.data
        assert all(run["name"].startswith(NASTY) for run in data["runs"])
        assert data["charts"]["layers"]["maps"][0]["layers"] == [NASTY_KEY]
        assert {f"train/{NASTY}loss", f"val/{NASTY}"} <= data["charts"].keys()
        assert NASTY_KEY in [line["scope"] for line in data["charts"]["eps_curve"]["lines"]]
        assert {each["code"] for each in data["findings"]} == {NASTY}
        assert {each["reason"] for each in data["events"]} == {NASTY}
    assert f"layer {NASTY_KEY}" in report_of(*runs).named("difference")[0]


def test_name_with_invalid_unicode_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report([run_of({KEY: {0: 1.0}}, "\udcff")], file)
    assert ParsedReport(file.read_text(encoding="utf-8")).texts("strong", "run") == [r"\udcff"]


# ---- Errors


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


# ---- Layers, largest values, axes


def test_layers_are_sorted_by_their_numbers() -> None:
    names = ["net.10", "net.2", "net.1.b", "net.1.a", "10", "9", "net"]
    found = report_of(run_of({LAYER_KEY.format(name): {0: 1.0} for name in names}))
    (shown,) = found.charts["layers"]["maps"]
    assert shown["layers"] == ["9", "10", "net", "net.1.a", "net.1.b", "net.2", "net.10"]


def test_largest_values_are_curves_that_name_their_tensors() -> None:
    worst = scoped("worst_1")
    run = run_of({KEY: {0: 1.0}, worst: {0: 2.0, 1: 4.0, 2: 3.0}})
    run.tensors[worst] = {0: "net.0.weight", 1: "net.1.bias", 2: "net.0.weight"}
    model, largest = report_of(run).charts["update_norm"]["lines"]
    assert (model["scope"], largest["scope"]) == ("model", "worst 1")
    assert "tensors" not in model
    names, places = largest["tensors"]["names"], largest["tensors"]["places"]
    assert [names[place] for place in places] == ["net.0.weight", "net.1.bias", "net.0.weight"]


def test_references_are_those_of_each_run_and_of_its_own_rule_settings() -> None:
    def references(*configs: dict[str, Any]) -> set[tuple[Any, ...]]:
        series = {STATISTICS["rms_ratio_max"].key: {0: 1.0}}
        runs = [run_of(series, config={"lightning_adam": config}) for config in configs]
        found = report_of(*runs).charts["rms_ratio_max"]["references"]
        return {(each["code"], round(each["value"], 6), *each["runs"]) for each in found}

    adam = {"class": "Adam", "betas": [0.9, 0.99]}
    other = {"class": "Adam", "betas": [0.9, 0.9999]}
    rule = ("exp_avg_sq_lags", RULES["exp_avg_sq_lags"].thresholds["threshold"])
    assert references({}) == {(*rule, 0)}
    assert references({"optimizer": adam}, {"optimizer": other}) == {
        *((*rule, 0, 1), ("", 10.0, 0), ("", 100.0, 1))
    }
    assert references({"optimizer": {"g": adam, "d": other}}) == {
        *((*rule, 0), ("", 10.0, 0), ("", 100.0, 0))
    }
    strict = {"findings": {"exp_avg_sq_lags": {"threshold": 2.5}}}
    disabled = {"findings": {"exp_avg_sq_lags": {"severity": "off"}}}
    assert references({}, strict, disabled) == {(*rule, 0), ("exp_avg_sq_lags", 2.5, 1)}


def test_wall_clock_times_are_limited_and_include_the_last() -> None:
    run, steps = run_of({KEY: {0: 1.0}}), np.arange(0, 50_000, 10)
    whole = Series(steps, 1e9 + steps / np.float64(2))
    for length in (2, 3, MAX_TIMES, MAX_TIMES + 1, len(steps)):
        times = Series(whole.steps[:length], whole.values[:length])
        (found,) = report_of(replace(run, times=times)).data["runs"]
        shown = found["times"]
        assert len(shown["steps"]) <= MAX_TIMES + 1
        assert (shown["steps"][0], shown["steps"][-1]) == (0, steps[length - 1])
        assert shown["seconds"] == [0.5 * step for step in shown["steps"]]
    for none in (None, Series(whole.steps[:1], whole.values[:1])):
        assert report_of(replace(run, times=none)).data["runs"] == [{"name": "run", "times": None}]


# ---- Findings


def reported(*findings: Finding, name: str = "eps_energy_loss") -> ParsedReport:
    return report_of(replace(run_of({STATISTICS[name].key: {0: 1.0}}), findings=[*findings]))


def test_findings_of_one_code_are_listed_together() -> None:
    scopes = ["layer/net.3", "model", "group/decay", "layer/net.1", "model"]
    found = [finding(scope=scope, step=1000 + at, closed=2000) for at, scope in enumerate(scopes)]
    found += [finding("updates_lost", "error", step=40), finding("warmup_short", "info", step=0)]
    report = reported(*found)
    articles = report.all("article")
    assert [" ".join(each.inner("h3")[0].text.split()) for each in articles] == [
        *("updates_lost error", "eps_dominates warning", "warmup_short info")
    ]
    lost, dominates, short = (" ".join(each.text.split()) for each in articles)
    assert "model, from step 40 to the end" in lost
    assert "model, group/decay, layer/net.3 and 1 more, from step 1,000 to step 2,000" in dominates
    assert "Found in model, group/decay, layer/net.3, layer/net.1" in dominates
    assert "eps_dominates in layer/net.3 at step 1000." in dominates
    assert "before the first step" in short
    # What is not above info is folded.
    (notes,) = report.all("details", "notes")
    assert [each.attributes["class"] for each in notes.inner("article")] == ["finding info"]
    assert "1 note: warmup_short" in notes.text


def test_finding_links_to_the_chart_that_shows_it() -> None:
    layer = scoped("layer/net.0", STATISTICS["eps_energy_loss"].key)
    curve = {STATISTICS["eps_energy_loss"].key: {0: 1.0}}
    with each_row() as row:
        for series, scope, expected in (
            (curve, "model", "eps_energy_loss"),
            (curve, "layer/net.0", "eps_energy_loss"),
            ({**curve, layer: {0: 1.0}}, "layer/net.0", "layers"),
            ({**curve, layer: {0: 1.0}}, "group/decay", "eps_energy_loss"),
            ({KEY: {0: 1.0}}, "model", None),
        ):
            with row((scope, expected)):
                report = report_of(replace(run_of(series), findings=[finding(scope=scope)]))
                links = [each.attributes for each in report.all("a")]
                assert [each["data-chart"] for each in links] == ([expected] if expected else [])
                assert all(each["data-statistic"] == "eps_energy_loss" for each in links)
                assert all(each["data-scope"] == scope.partition("/")[2] for each in links)
                assert ("eps_energy_loss is not logged." in report.text) is (expected is None)
    # Findings of one statistic have separate links.
    series = {
        STATISTICS["update_to_weight"].key_of(part): {0: 1.0} for part in ("", "layer/net.0/")
    }
    found = [
        finding("learning_rate_too_large", scope="layer/net.0"),
        finding("learning_rate_too_small"),
    ]
    report = report_of(replace(run_of(series), findings=found))
    assert report.values("data-chart")[:2] == ["layers", "update_to_weight"]


def test_intervals_of_findings_are_those_above_info() -> None:
    found = [
        finding(step=8, optimizer="encoder"),
        finding(step=12, closed=20, optimizer="decoder", severity="error"),
        finding(step=0, optimizer="encoder"),
        finding("warmup_short", "info", step=4),
    ]
    intervals = {each.pop("optimizer"): each for each in reported(*found).data["findings"]}
    # The x-axis counts steps from 0.
    common = {"run": 0, "code": "eps_dominates", "statistics": ["eps_energy_loss"]}
    assert intervals == {
        "decoder": common | {"severity": "error", "start": 11, "end": 19},
        "encoder": common | {"severity": "warning", "start": 7, "end": None},
    }


def test_suggestions_keep_their_order() -> None:
    suggestions = (
        Suggestion(hint="inspect the batches", is_lead=True),
        Suggestion(("optimizer.lr=0.1,1",), is_lead=True, is_sweep=True),
        Suggestion(("optimizer.eps=1e-10",), "then compare"),
        Suggestion(hint="stop"),
    )
    report = reported(finding("loss_spike", suggestions=suggestions))
    assert report.named("suggestion") == [
        "Try: inspect the batches",
        "Try: --multirun optimizer.lr=0.1,1",
        "Use: optimizer.eps=1e-10 then compare",
        "Do: stop",
    ]
