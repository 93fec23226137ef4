"""How findings are raised, suppressed, closed and stored over several measurements."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_adam import AdamStatistics
from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings import RULES, Suggestion, rule, suggestions
from lightning_adam.findings.context import RunFacts
from lightning_adam.findings.describe import describe_raised, summarize
from lightning_adam.findings.engine import EXTRA_PATIENCE, Changes, RuleEngine
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.preflight import preflight
from lightning_adam.findings.rule import Warmup
from tests.support.tables import each_row

TINY, LARGE = 1e-10, 1e-5
"""Gradients far below eps, and far above it."""
SMALL = 1e-8
"""Gradients that eps dominates, and that are not negligible relative to the large ones."""
LAYERS = (Scope.layer,)


class Loop:
    """Layers that are trained on noise of given sizes."""

    def __init__(
        self,
        engine: RuleEngine,
        names: str = "ab",
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.noise = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(500, 1, bias=False) for name in names})
        self.layers.to(dtype)
        self.adam = torch.optim.AdamW(self.layers.parameters(), **settings)
        self.engine = engine
        self.statistics = AdamStatistics(rule_statistics=engine.statistics, module=self.layers)
        self.step = 0
        self.low: dict[str, float] = {}
        """By scope: the 1st percentile of the denominators."""

    def run(self, steps: int, *sizes: float, **facts: Any) -> list[Changes]:
        """Trains with one noise size per layer, or one for all."""
        weights = [*self.layers.parameters()]
        sizes = sizes if len(sizes) > 1 else sizes * len(weights)
        changes = []
        for _ in range(steps):
            self.step += 1
            for weight, size in zip(weights, sizes, strict=True):
                noise = torch.randn(weight.shape, generator=self.noise)
                weight.grad = (size * noise).to(weight.dtype)
            self.adam.step()
            self.statistics.update(self.adam)
            run = RunFacts(**{"defaults": self.adam.defaults, **facts})
            measurement = self.statistics.measurement
            changes.append(
                self.engine.judge(measurement, self.step, run, low_denominator=self.low.get)
            )
        return changes


def codes(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.code, each.scope) for each in findings if each.is_above_info]


def test_finding_is_raised_once_after_its_patience_and_closed_after_recovery() -> None:
    loop = Loop(RuleEngine())
    changes = loop.run(60, TINY)
    (raised,) = [each for change in changes for each in change.raised]
    # Judged from step 31 on, after a warm-up of 3/(1-β1) steps; raised after three measurements.
    assert (raised.code, raised.scope, raised.step) == ("eps_dominates", "model", 33)
    assert raised.evidence["eps_energy_loss"] > 0.9
    assert set(raised.worst) == {"a.weight", "b.weight"}
    recovery = loop.run(10, LARGE)
    closed = {each.code: each.closed for change in recovery for each in change.closed}
    assert closed["eps_dominates"] == 60 + 3 + EXTRA_PATIENCE
    assert ("eps_dominates", "model") not in codes(loop.engine.open)
    assert ("eps_dominates", "model") in codes(loop.engine.findings)


def test_episodes_shorter_than_the_patience_raise_nothing() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    patience = RULES["eps_dominates"].patience
    for _ in range(20):
        for eps, steps in [(1.0, patience - 1), (1e-12, 3)]:
            loop.adam.param_groups[0]["eps"] = eps
            loop.run(steps, LARGE)
    assert "eps_dominates" not in [each.code for each in engine.findings]
    loop.adam.param_groups[0]["eps"] = 1.0
    loop.run(patience, LARGE)
    assert codes(engine.findings) == [("eps_dominates", "model")]


def test_fault_in_one_layer_is_reported_for_that_layer() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    loop.run(50, SMALL, LARGE)
    # Half of the energy is lost in the model, but its mean denominator is far above eps.
    assert codes(engine.open) == [("eps_dominates", "layer/a")]
    assert list(engine.open[-1].worst) == ["a.weight"]


def test_finding_of_the_model_replaces_those_of_its_layers() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    loop.run(40, SMALL, LARGE)
    assert codes(engine.open) == [("eps_dominates", "layer/a")]
    loop.adam.param_groups[0]["eps"] = 1e-4
    # Fewer measurements than the patience replace nothing.
    loop.run(RULES["eps_dominates"].patience - 1, SMALL, LARGE)
    assert codes(engine.open) == [("eps_dominates", "layer/a")]
    (change,) = loop.run(1, SMALL, LARGE)
    assert codes(engine.open) == [("eps_dominates", "model")]
    (layer,) = [each for each in change.closed if each.scope == "layer/a"]
    assert (layer.closed, layer.superseded_by) == (loop.step, "eps_dominates in model")


def test_root_cause_suppresses_its_symptoms() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    loop.run(40, TINY)
    loop.run(1, float("nan"))
    assert codes(engine.open)[-1] == ("not_finite", "model")
    loop.run(10, float("nan"))
    assert codes(engine.open) == [("not_finite", "model")]


def test_root_cause_suppresses_symptoms_of_the_same_measurement() -> None:
    """Weight decay that is lost is a symptom of updates that are lost."""
    lossy: dict[str, Any] = {"dtype": torch.bfloat16, "lr": 1e-6, "weight_decay": 0.1}
    rows = [({}, "updates_lost"), ({"updates_lost": {"severity": "off"}}, "decay_lost")]
    with each_row() as row:
        for settings, code in rows:
            with row(code):
                engine = RuleEngine(settings)
                loop = Loop(engine, **lossy)
                loop.run(RULES[code].patience, LARGE)
                assert codes(engine.findings) == [(code, "model")]


def test_not_finite_is_raised_at_once_and_names_the_tensor() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    (change,) = loop.run(1, LARGE, float("inf"))
    assert codes(change.raised) == [("not_finite", "model")]
    assert list(change.raised[0].worst) == ["b.weight"]


def test_gradient_that_has_vanished_raises_nothing() -> None:
    engine = RuleEngine()
    loop = Loop(engine, betas=(0.9, 0.95))
    loop.run(20, 1e-3)
    loop.run(600, TINY)
    assert codes(engine.findings) == []
    assert "eps_dominates" in [each.code for each in engine.open]


def test_thresholds_severity_and_patience_are_settings() -> None:
    for settings in ({"threshold": 1.5}, {"severity": "off"}):
        engine = RuleEngine({"eps_dominates": settings})
        Loop(engine).run(60, TINY)
        assert codes(engine.findings) == [], settings
    engine = RuleEngine({"eps_dominates": {"threshold": 0.1, "severity": "warning", "patience": 7}})
    Loop(engine).run(60, TINY)
    (found,) = [each for each in engine.open if each.code == "eps_dominates"]
    assert (found.severity, found.step) == (Severity.warning, 37)


def test_restored_engine_continues_as_if_uninterrupted() -> None:
    loop, restored = Loop(RuleEngine()), RuleEngine()
    for step in range(1, 61):
        loop.run(1, TINY)
        run = RunFacts(defaults=loop.adam.defaults)
        restored.judge(loop.statistics.measurement, step, run)
        if step % 5 == 0:
            state = json.loads(json.dumps(restored.state()))
            restored = RuleEngine()
            restored.restore(state)
    assert codes(restored.open) == [("eps_dominates", "model")]
    assert restored.open == loop.engine.open
    assert restored.state() == loop.engine.state()


def test_open_finding_is_dropped_if_its_rule_is_off_after_a_resume() -> None:
    loop = Loop(RuleEngine())
    loop.run(40, TINY)
    restored = RuleEngine({"eps_dominates": {"severity": "off"}})
    restored.restore(loop.engine.state())
    loop.engine = restored
    loop.run(1, TINY)
    assert restored.findings == []


# ---- Scopes


@pytest.fixture
def symptom() -> Iterator[None]:
    """A rule that always raises a finding, unless eps_dominates suppresses it."""

    @rule(
        severity=Severity.warning,
        sentence="There is a symptom.",
        when="grad_norm is above 0",
        suggest=suggestions.no_suggestion,
        source="this test",
        scopes=LAYERS,
        warmup=Warmup.NONE,
        suppressed_by=("eps_dominates",),
    )
    def symptom(grad_norm: float) -> bool:
        """A symptom."""
        return grad_norm > 0

    yield
    del RULES["symptom"]


@pytest.mark.usefixtures("symptom")
def test_cause_in_a_layer_suppresses_symptoms_of_that_layer_only() -> None:
    a, b = (("symptom", f"layer/{name}") for name in "ab")
    with each_row() as row:
        for patience, early in [(3, [a, b]), (40, [])]:
            with row(patience):
                engine = RuleEngine({"symptom": {"patience": patience}})
                loop = Loop(engine)
                loop.run(10, SMALL, LARGE)
                assert codes(engine.open) == early
                loop.run(40, SMALL, LARGE)
                assert {*codes(engine.open)} == {("eps_dominates", "layer/a"), b}
                closed = [each for each in engine.findings if not each.is_open]
                assert codes(closed) == early[:1]
                assert all(each.superseded_by == "eps_dominates in layer/a" for each in closed)


@pytest.mark.usefixtures("symptom")
def test_cause_in_the_model_suppresses_symptoms_of_its_layers() -> None:
    engine = RuleEngine()
    Loop(engine).run(40, TINY)
    assert codes(engine.open) == [("eps_dominates", "model")]
    ends = {each.superseded_by for each in engine.findings if each.code == "symptom"}
    assert ends == {"eps_dominates in model"}


def test_local_rules_are_judged_in_the_scopes_of_the_monitor_at_warning_at_most() -> None:
    """The updates of one layer of three are lost: its weights are large."""

    def found(scopes: tuple[Scope, ...]) -> list[tuple[str, str, Severity]]:
        engine = RuleEngine(scopes=scopes)
        loop = Loop(engine, "abc", torch.bfloat16, weight_decay=0.0)
        with torch.no_grad():
            loop.layers.get_parameter("a.weight").add_(100)
        loop.run(5, LARGE)
        shown = [each for each in engine.open if each.is_above_info]
        return [(each.code, each.scope, each.severity) for each in shown]

    assert RULES["updates_lost"].severity is Severity.error
    assert found(()) == []
    assert found(LAYERS) == [("updates_lost", "layer/a", Severity.warning)]


def test_last_suggestion_takes_all_layers_into_account() -> None:
    """Two layers need eps=1e-11 and eps=1e-13."""
    with each_row() as row:
        for low in ({"layer/a": 3e-10, "layer/b": 3e-12}, {"layer/a": 3e-12, "layer/b": 3e-10}):
            for later in (SMALL, LARGE):
                with row((low, later)):
                    engine = RuleEngine({"eps_dominates": {"converged_below": 0.0}})
                    loop = Loop(engine, "abc")
                    loop.low = low
                    changes = loop.run(40, SMALL, later, LARGE)
                    # Drop the state, which still contains large gradients.
                    loop.adam.state.pop(loop.layers.get_parameter("b.weight"))
                    changes += loop.run(40, SMALL, SMALL, LARGE)
                    raised = [each for change in changes for each in change.raised]
                    shown = [each for each in raised if each.is_above_info]
                    assert codes(shown) == [("eps_dominates", scope) for scope in low]
                    for text in (describe_raised(shown), summarize(engine.findings, 80)):
                        assert text.count("optimizer.eps=") == 1
                        assert "optimizer.eps=1e-13" in text


# ---- Preflight notices


def test_notice_does_not_suppress_findings() -> None:
    """A notice about a short schedule does not hide lost updates."""
    engine = RuleEngine()
    facts: dict[str, Any] = {"schedule": {"name": "cosine", "total_steps": 10}, "total_steps": 1000}
    assert "schedule_length" in [each.code for each in preflight(RunFacts(**facts))]
    Loop(engine, dtype=torch.bfloat16, lr=1e-6).run(5, LARGE, **facts)
    assert codes(engine.open) == [("updates_lost", "model")]


# ---- Learning-rate warm-up


def test_rule_waits_until_the_learning_rate_has_reached_its_peak() -> None:
    """In bfloat16, the first updates of a warm-up are lost in healthy runs."""

    def raised(until: int, **facts: Any) -> list[tuple[str, int]]:
        engine = RuleEngine()
        loop = Loop(engine, dtype=torch.bfloat16, lr=0.0)
        for step in range(1, 41):
            loop.adam.param_groups[0]["lr"] = 1e-6 * min(step, until)
            loop.run(1, LARGE, **facts)
        return [(each.code, each.step) for each in engine.findings if each.is_above_info]

    patience = RULES["updates_lost"].patience
    assert raised(until=100) == []
    assert raised(until=1) == [("updates_lost", patience)]
    assert raised(until=1, schedule={"warmup_steps": 30}) == [("updates_lost", 30 + patience)]
    # If the schedule is unknown, steps with a rising learning rate are not judged.
    ((_, step),) = raised(until=20)
    assert 20 < step <= 20 + patience


def test_gates_initialized_to_zero_raise_nothing_during_warmup() -> None:
    engine = RuleEngine()
    loop = Loop(engine, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        loop.layers.get_parameter("a.weight").zero_()
    for step in range(1, 101):
        loop.adam.param_groups[0]["lr"] = 1e-2 * min(step / 100, 1.0)
        loop.run(1, LARGE, schedule={"warmup_steps": 100})
    assert codes(engine.findings) == []


# ---- Custom rules


@pytest.fixture
def custom_rule() -> Iterator[None]:
    @rule(
        severity=Severity.error,
        sentence="The gradient's norm is {grad_norm:.3g}.",
        when="grad_norm is above {threshold:g}",
        suggest=lambda context: [Suggestion(("trainer.gradient_clip_val=1.0",))],
        source="this test",
        warmup=Warmup.NONE,
        patience=2,
    )
    def large_gradient(grad_norm: float, *, threshold: float = 10.0) -> bool:
        """Gradients are larger than usual."""
        return not grad_norm <= threshold

    yield
    del RULES["large_gradient"]


@pytest.mark.usefixtures("custom_rule")
def test_custom_rule_is_raised_with_its_own_settings_and_suggestion() -> None:
    settings = {"exp_avg_sq_lags": {"severity": "off"}}
    loop = Loop(RuleEngine({**settings, "large_gradient": {"threshold": 5.0}}))
    loop.run(1, LARGE)
    loop.run(2, 1.0)
    (found,) = [each for each in loop.engine.open if each.code == "large_gradient"]
    assert found.remedy == ("trainer.gradient_clip_val=1.0",)
    assert found.sentence.startswith("The gradient's norm is 3")


@pytest.mark.usefixtures("custom_rule")
def test_tensor_with_a_nan_statistic_is_named_first_among_the_worst() -> None:
    loop = Loop(RuleEngine())
    loop.run(2, LARGE, float("nan"))
    (found,) = [each for each in loop.engine.open if each.code == "large_gradient"]
    assert list(found.worst) == ["b.weight", "a.weight"]


def test_custom_rule_with_a_used_name_or_an_unknown_statistic_raises() -> None:
    given: dict[str, Any] = {
        "severity": Severity.info,
        "sentence": "",
        "when": "",
        "suggest": lambda context: [],
        "source": "",
    }
    with pytest.raises(ConfigError, match=r"@rule eps_dominates: .* already defines a rule"):

        @rule(**given)
        def eps_dominates(eps: float) -> bool:
            return True

    with pytest.raises(ConfigError, match=r"gradnorm is neither a statistic nor one of"):

        @rule(**given)
        def mine(gradnorm: float) -> bool:
            return True


def test_parameter_groups_with_different_settings_are_judged() -> None:
    engine = RuleEngine()
    loop = Loop(engine)
    parameters = [
        {"params": [loop.layers["a"].weight], "lr": 1e-3, "eps": 1e-8},
        {"params": [loop.layers["b"].weight], "lr": 1e-2, "eps": 1e-7},
    ]
    loop.adam = torch.optim.AdamW(parameters)
    loop.run(50, TINY)
    assert codes(engine.open) == [("eps_dominates", "model")]
