"""Findings from one measurement to the next: raised, suppressed, closed, and kept."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_adam import AdamStatistics
from lightning_adam.config.errors import ConfigError
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES, Cure, rule
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.rule import Training, Warmup
from lightning_adam.findings.watch import CLOSING, Changes, Watch
from tests.support.tables import each_row

TINY, LARGE = 1e-10, 1e-3
"""Gradients far below eps, and far above it."""


class Loop:
    """Two layers that are trained on noise of a given size."""

    def __init__(
        self,
        watch: Watch,
        elements: int = 500,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.noise = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleDict({"a": _weights(elements), "b": _weights(elements)}).to(dtype)
        self.adam = torch.optim.AdamW(self.layers.parameters(), **settings)
        self.watch = watch
        self.statistics = AdamStatistics(judged=watch.statistics, module=self.layers)
        self.step = 0

    def run(self, steps: int, a: float, b: float | None = None, **training: Any) -> list[Changes]:
        changes = []
        for _ in range(steps):
            self.step += 1
            for name, size in (("a", a), ("b", a if b is None else b)):
                weight = self.layers.get_parameter(f"{name}.weight")
                noise = torch.randn(weight.shape, generator=self.noise)
                weight.grad = (size * noise).to(weight.dtype)
            self.adam.step()
            self.statistics.update(self.adam)
            training_now = Training(**{"defaults": self.adam.defaults, **training})
            changes.append(self.watch.judge(self.statistics.measurement, self.step, training_now))
        return changes


def _weights(elements: int) -> nn.Module:
    return nn.Linear(elements, 1, bias=False)


def codes(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.code, each.scope) for each in findings if each.severity is not Severity.info]


def test_finding_is_raised_once_after_its_persistence_and_closed_after_recovery() -> None:
    loop = Loop(Watch())
    changes = loop.run(60, TINY)
    (raised,) = [each for change in changes for each in change.raised]
    # Judged from step 31 on: 3/(1-β1) steps are not, and three measurements have to agree.
    assert (raised.code, raised.scope, raised.step) == ("eps_dominates", "model", 33)
    assert raised.evidence["eps_energy_loss"] > 0.9
    assert set(raised.worst) == {"a.weight", "b.weight"}
    recovery = loop.run(10, LARGE)
    closed = {each.code: each.closed for change in recovery for each in change.closed}
    assert closed["eps_dominates"] == 60 + 3 + CLOSING
    assert ("eps_dominates", "model") not in codes(loop.watch.open)
    assert ("eps_dominates", "model") in codes(loop.watch.all)


def test_episodes_shorter_than_the_persistence_raise_nothing() -> None:
    watch = Watch({"exp_avg_sq_lags": {"severity": "off"}})
    loop = Loop(watch, betas=(0.9, 0.5))
    for _ in range(20):
        loop.run(2, TINY)
        loop.run(3, LARGE)
    assert codes(watch.all) == []


def test_fault_in_one_layer_is_reported_for_that_layer() -> None:
    watch = Watch()
    loop = Loop(watch)
    loop.run(50, TINY, b=LARGE)
    # Half of the energy is lost in the model, but its mean denominator is far above eps.
    assert codes(watch.open) == [("eps_dominates", "layer/a")]
    assert list(watch.open[-1].worst) == ["a.weight"]


def test_finding_of_the_model_replaces_those_of_its_layers() -> None:
    watch = Watch()
    loop = Loop(watch, betas=(0.9, 0.95))
    loop.run(50, TINY, b=LARGE)
    assert codes(watch.open) == [("eps_dominates", "layer/a")]
    loop.run(400, TINY)
    assert codes(watch.open) == [("eps_dominates", "model")]


def test_root_cause_suppresses_its_symptoms() -> None:
    watch = Watch()
    loop = Loop(watch)
    loop.run(40, TINY)
    loop.run(1, float("nan"))
    assert codes(watch.open)[-1] == ("not_finite", "model")
    loop.run(10, float("nan"))
    assert codes(watch.open) == [("not_finite", "model")]


def test_root_cause_suppresses_symptoms_of_the_same_measurement() -> None:
    """Weight decay that is lost is a symptom of updates that are lost."""
    lossy: dict[str, Any] = {"dtype": torch.bfloat16, "lr": 1e-6, "weight_decay": 0.1}
    rows = [({}, "updates_lost"), ({"updates_lost": {"severity": "off"}}, "decay_lost")]
    with each_row() as row:
        for settings, code in rows:
            with row(code):
                watch = Watch(settings)
                Loop(watch, **lossy).run(RULES[code].persistence, LARGE)
                assert codes(watch.all) == [(code, "model")]


def test_not_finite_is_raised_at_once_and_names_the_tensor() -> None:
    watch = Watch()
    loop = Loop(watch)
    (change,) = loop.run(1, LARGE, b=float("inf"))
    assert codes(change.raised) == [("not_finite", "model")]
    assert list(change.raised[0].worst) == ["b.weight"]


def test_vanished_loss_raises_nothing() -> None:
    watch = Watch()
    Loop(watch).run(60, TINY, loss_share=1e-3)
    assert codes(watch.all) == []


def test_thresholds_severity_and_persistence_are_settings() -> None:
    for settings in ({"threshold": 1.5}, {"severity": "off"}):
        watch = Watch({"eps_dominates": settings})
        Loop(watch).run(60, TINY)
        assert codes(watch.all) == [], settings
    watch = Watch({"eps_dominates": {"threshold": 0.1, "severity": "warning", "persistence": 7}})
    Loop(watch).run(60, TINY)
    (found,) = [each for each in watch.open if each.code == "eps_dominates"]
    assert (found.severity, found.step) == (Severity.warning, 37)


def test_restored_watch_continues_as_if_uninterrupted() -> None:
    uninterrupted, parts = Loop(Watch()), Loop(Watch())
    uninterrupted.run(60, TINY)
    for _ in range(12):
        parts.run(5, TINY)
        state = json.loads(json.dumps(parts.watch.state()))
        parts.watch = Watch()
        parts.watch.restore(state)
    assert parts.watch.open == uninterrupted.watch.open
    assert parts.watch.state() == uninterrupted.watch.state()


@pytest.fixture
def custom_rule() -> Iterator[None]:
    @rule(
        severity=Severity.error,
        sentence="The gradient's norm is {grad_norm:.3g}.",
        remedy=lambda case: [Cure(("trainer.gradient_clip_val=1.0",))],
        source="this test",
        warmup=Warmup.NONE,
        persistence=2,
    )
    def large_gradient(grad_norm: float, *, threshold: float = 10.0) -> bool:
        """Gradients are larger than ever."""
        return not grad_norm <= threshold

    yield
    del RULES["large_gradient"]


@pytest.mark.usefixtures("custom_rule")
def test_custom_rule_is_raised_with_its_own_settings_and_remedy() -> None:
    settings = {"exp_avg_sq_lags": {"severity": "off"}}
    loop = Loop(Watch({**settings, "large_gradient": {"threshold": 5.0}}))
    loop.run(1, LARGE)
    loop.run(2, 1.0)
    (found,) = [each for each in loop.watch.open if each.code == "large_gradient"]
    assert found.remedy == ("trainer.gradient_clip_val=1.0",)
    assert found.sentence.startswith("The gradient's norm is 3")


@pytest.mark.usefixtures("custom_rule")
def test_tensor_with_a_nan_statistic_is_named_first_among_the_worst() -> None:
    loop = Loop(Watch())
    loop.run(2, LARGE, b=float("nan"))
    (found,) = [each for each in loop.watch.open if each.code == "large_gradient"]
    assert list(found.worst) == ["b.weight", "a.weight"]


def test_custom_rule_with_a_taken_name_or_an_unknown_statistic_raises() -> None:
    given: dict[str, Any] = {
        "severity": Severity.info,
        "sentence": "",
        "remedy": lambda case: [],
        "source": "",
    }
    with pytest.raises(ConfigError, match=r"@rule eps_dominates: .* defines a rule of this name"):

        @rule(**given)
        def eps_dominates(eps: float) -> bool:
            return True

    with pytest.raises(ConfigError, match=r"gradnorm is neither a statistic nor one of"):

        @rule(**given)
        def mine(gradnorm: float) -> bool:
            return True


def test_parameter_groups_with_different_settings_are_judged() -> None:
    watch = Watch()
    loop = Loop(watch)
    parameters = [
        {"params": [loop.layers["a"].weight], "lr": 1e-3, "eps": 1e-8},
        {"params": [loop.layers["b"].weight], "lr": 1e-2, "eps": 1e-7},
    ]
    loop.adam = torch.optim.AdamW(parameters)
    loop.run(50, TINY)
    assert codes(watch.open) == [("eps_dominates", "model")]
