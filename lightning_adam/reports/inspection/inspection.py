"""Inspects a checkpoint: measures the last step of each optimizer, and runs the rules on it."""

import math
from dataclasses import dataclass
from pathlib import Path

from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.context import RunFacts
from lightning_adam.findings.engine import RuleEngine
from lightning_adam.findings.finding import Finding
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.reports.inspection.checkpoint import Checkpoint, read
from lightning_adam.reports.inspection.measurements import LastStep, measure_last_step
from lightning_adam.reports.inspection.saved_optimizer import SavedOptimizer, saved_optimizers
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.dtypes import dtype_name


@dataclass(frozen=True)
class InspectedOptimizer:
    """An optimizer with its measurements and findings."""

    saved: SavedOptimizer
    last_step: LastStep
    findings: list[Finding]
    judged: list[str]
    """The codes of the rules that were judged."""

    @property
    def steps(self) -> list[int]:
        """The distinct step counts of the tensors in ascending order."""
        return sorted({int(each) for each in self.last_step.states.step if math.isfinite(each)})

    def not_judged(self) -> dict[str, list[str]]:
        """Returns the codes of the rules that were not judged, by reason."""
        gradient, weights = "need the gradient", "need weights or state that are not known"
        history = "need several measurements"
        reasons: dict[str, list[str]] = {gradient: [], weights: [], history: []}
        for code in RULES.keys() - {*self.judged}:
            unknown = {*RULES[code].statistics} - self.last_step.names
            needs_gradient = any(
                Capabilities.GRADIENT in STATISTICS[each].needs for each in unknown
            )
            reason = gradient if needs_gradient else weights if unknown else history
            reasons[reason].append(code)
        return {reason: sorted(codes) for reason, codes in reasons.items() if codes}


@dataclass(frozen=True)
class Inspection:
    """The inspected optimizers of a checkpoint."""

    checkpoint: Checkpoint
    optimizers: list[InspectedOptimizer]
    not_inspected: list[str]
    """Why other optimizers are not inspected."""


def inspect(path: Path) -> Inspection:
    """Inspects a checkpoint.

    Args:
        path: A checkpoint of Lightning, or a file of `torch.save` that contains the state_dict of
            an optimizer.

    Raises:
        ConfigError: If it cannot be read, or has no Adam-like optimizer.
    """
    checkpoint = read(path)
    saved, not_inspected = saved_optimizers(checkpoint)
    return Inspection(checkpoint, [*map(_inspect_optimizer, saved)], not_inspected)


def _inspect_optimizer(saved: SavedOptimizer) -> InspectedOptimizer:
    last_step = measure_last_step(saved)
    # A checkpoint is a single measurement without history.
    judged = [
        code
        for code, rule in RULES.items()
        if {*rule.statistics} <= last_step.names and not {"history", "spikes"} & {*rule.takes}
    ]
    found = InspectedOptimizer(saved, last_step, [], judged)
    settings = {
        code: {"patience": 1} if code in judged else {"severity": Severity.off} for code in RULES
    }
    engine, step = RuleEngine(settings, saved.name), max(found.steps, default=0)
    engine.judge(
        last_step.measurement,
        step,
        _run_facts(saved, last_step),
        low_denominator=last_step.low_denominator,
    )
    found.findings.extend(engine.open)
    return found


def _run_facts(saved: SavedOptimizer, last_step: LastStep) -> RunFacts:
    first, states = saved.groups[0], last_step.states
    tensors = states.parameter if saved.weights else states.exp_avg
    return RunFacts(
        defaults={**first, "lr": float(peak_lr(first))},
        dtypes=frozenset(dtype_name(each.dtype) for each in tensors),
        peak_lr=max(float(peak_lr(group)) for group in saved.groups),
    )
