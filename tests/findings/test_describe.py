"""Text of findings."""

import math
from dataclasses import replace

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES, Suggestion
from lightning_adam.findings.context import RunFacts
from lightning_adam.findings.describe import describe_closed, describe_raised, summarize
from lightning_adam.findings.finding import Finding
from tests.support.tables import each_row

EPS = (Suggestion(("optimizer.eps=1e-10",)),)
FIRST = Finding(
    "eps_dominates", Severity.error, "model", 40, "eps dominates.", {}, {}, EPS, "", "encoder"
)
SECOND = replace(FIRST, optimizer="decoder", suggestions=(Suggestion(("decoder.eps=1e-12",)),))


def test_findings_of_two_optimizers_are_described_separately() -> None:
    for text in (describe_raised([FIRST, SECOND]), summarize([FIRST, SECOND], 60)):
        lines = text.splitlines()
        found = [line for line in lines if "of encoder" in line or "of decoder" in line]
        assert len(found) == 2
        assert [line for line in lines if "use:" in line] == [
            "  use:     optimizer.eps=1e-10",
            "  use:     decoder.eps=1e-12",
        ]


def test_scopes_of_one_optimizer_are_described_together() -> None:
    scopes = [replace(FIRST, optimizer="", scope=f"layer/{place}") for place in range(5)]
    title = describe_raised(scopes).splitlines()[0]
    assert title.endswith("at step 40, in layer/0, layer/1, layer/2 and 2 more")


def test_summary_says_until_when_a_finding_was_open() -> None:
    rows = [
        ([FIRST], "from step 40 to the end"),
        ([replace(FIRST, closed=50), FIRST], "from step 40 to the end"),
        ([replace(FIRST, closed=50), replace(FIRST, closed=60)], "from step 40 to step 60"),
    ]
    with each_row() as row:
        for findings, expected in rows:
            with row(expected):
                title, line, *_ = summarize(findings, 60).splitlines()
                assert title == "AdamMonitor: 1 issue in 60 measurements"
                assert line.endswith(expected)


def test_most_severe_finding_gives_the_severity_of_its_group() -> None:
    layer = replace(FIRST, severity=Severity.warning, scope="layer/0")
    assert "eps_dominates (error)" in describe_raised([layer, FIRST])
    assert "eps_dominates (error) of encoder, from step 30" in summarize(
        [replace(layer, step=30), FIRST], 60
    )


def test_closed_finding_is_resolved_or_superseded() -> None:
    resolved = replace(FIRST, closed=50)
    assert "eps_dominates resolved at step 50" in describe_closed([resolved])
    superseded = replace(resolved, superseded_by="not_finite in model")
    assert "superseded by not_finite in model at step 50" in describe_closed([superseded])


def test_interval_is_suggested_only_where_a_shorter_one_helps() -> None:
    """The rule needs three measurements after step 30."""
    title, reason = "No issues found (2 measurements)", "the run is too short: eps_dominates."
    rows = [
        (RunFacts(total_steps=60, every_n_steps=50), "every_n_steps=10 in a run of 60 steps."),
        # Measured often enough, but the run ended early.
        (RunFacts(total_steps=600, every_n_steps=50), reason),
        (RunFacts(total_steps=32, every_n_steps=50), reason),
        (RunFacts(total_steps=math.inf, every_n_steps=50), reason),
    ]
    with each_row() as row:
        for run, expected in rows:
            with row(run):
                text = summarize([], 2, [RULES["eps_dominates"]], run)
                assert expected in text
                assert (title in text) == (expected == reason)
