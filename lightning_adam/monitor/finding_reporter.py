"""`FindingReporter`: runs the rules on measurements, and reports their findings."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.monitor import MonitorConfig, Scope, Severity
from lightning_adam.findings.context import RunFacts
from lightning_adam.findings.describe import describe_closed, describe_raised, summarize
from lightning_adam.findings.engine import RuleEngine
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.preflight import preflight
from lightning_adam.monitor.publishing import Publisher, alert, log_findings, write_findings
from lightning_adam.monitor.run_facts import run_facts, with_config
from lightning_adam.optim.console import log_info, log_warning
from lightning_adam.statistics import kernels
from lightning_adam.statistics.histograms import DENOMINATOR_POSITION, HARMLESS, magnitude_above
from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.state_reader import StateReader, steps_as_adam

MAX_PRINTED = 3
"""How often a recurring finding is printed."""


@dataclass
class _OptimizerRules:
    """An optimizer, its rules and the facts of its run."""

    optimizer: Optimizer
    engine: RuleEngine
    run: RunFacts
    measurements: int = 0


class FindingReporter:
    """Reports findings to the console and the loggers, and requests to stop the run.

    Args:
        config: The monitor's config.
        path: Config path of the monitor.
        publisher: Writes to the loggers.
        module: The module that holds the parameters.
        every_n_steps: Optimizer steps from one measurement to the next.
    """

    def __init__(
        self,
        config: MonitorConfig,
        path: ConfigPath,
        publisher: Publisher,
        module: nn.Module,
        every_n_steps: int,
    ) -> None:
        self._config = config
        self._path = with_config(path)
        self._publisher = publisher
        self._module = module
        self._every_n_steps = every_n_steps
        self._optimizers: dict[str, _OptimizerRules] = {}
        self._notices: list[Finding] = []
        self.should_stop = False
        """Whether a finding of `stop_on` was raised."""
        self._has_unlogged_findings = False
        self._started = time.monotonic()
        self._printed: Counter[tuple[str, str, str]] = Counter()

    @property
    def findings(self) -> list[Finding]:
        """Preflight notices, then open and closed findings, in the order of their steps."""
        return [*self._notices, *self._raised]

    @property
    def _raised(self) -> list[Finding]:
        return [finding for each in self._optimizers.values() for finding in each.engine.findings]

    def track(self, optimizer: Optimizer, name: str) -> list[str]:
        """Adds an optimizer, and returns the statistics that its rules read.

        Args:
            optimizer: The optimizer.
            name: Its name; empty if it is the only one.
        """
        scopes = [each for each in self._config.scopes if each is not Scope.model]
        engine = RuleEngine(self._config.findings, name, scopes)
        self._optimizers[name] = _OptimizerRules(optimizer, engine, RunFacts())
        return engine.statistics

    def start(self, trainer: Trainer, module: LightningModule, x: int) -> None:
        """Reports the preflight notices.

        Args:
            trainer: The trainer.
            module: The module that is trained.
            x: The logged step.
        """
        self._notices = []
        for name, each in self._optimizers.items():
            facts = run_facts(trainer, module, self._module, each.optimizer)
            each.run = dataclasses.replace(
                facts, every_n_steps=self._every_n_steps, monitor_path=self._path
            )
            self._notices += preflight(each.run, self._config.findings, name)
        self._report(self._notices, x)
        self.write()

    def judge(
        self,
        name: str,
        measurement: Measurement,
        step: int,
        x: int,
        loss: float = math.nan,
        is_due: bool = True,
        is_resumed: bool = False,
        may_wait: bool = True,
    ) -> None:
        """Runs the rules on a measurement, and reports raised and closed findings.

        Args:
            name: The optimizer's name.
            measurement: The measurement.
            step: Its optimizer step.
            x: The logged step.
            loss: The loss of its batch (default: unknown).
            is_due: Whether a measurement was due at this step (default: True).
            is_resumed: Whether it is the first step after a resume (default: False).
            may_wait: Whether to wait for the device, to compute a suggestion from the parameters
                (default: True).
        """
        rules = self._optimizers[name]
        if is_resumed:
            self._report(rules.engine.judge_resumed(measurement, step, rules.run), x)
        if not is_due:
            return
        rules.measurements += 1

        def denominator_of(scope: str) -> float | None:
            if not may_wait:
                return None
            return low_denominator(rules.optimizer, self._module, measurement, scope)

        changes = rules.engine.judge(measurement, step, rules.run, loss, denominator_of)
        if changes.closed:
            self._has_unlogged_findings = True
            printed = [each for each in changes.closed if self._is_printed(each)]
            if printed:
                log_info(describe_closed(printed))
        self._report(changes.raised, x)

    def finish(self, x: int) -> None:
        """Reports all findings at the end of the run. Call `write` after it.

        Args:
            x: The logged step.
        """
        measured = [each for each in self._optimizers.values() if each.measurements]
        if measured:
            first = max(measured, key=lambda each: len(each.engine.unjudged()))
            number = sum(each.measurements for each in measured)
            log_info(summarize(self._raised, number, first.engine.unjudged(), first.run))
        if self._has_unlogged_findings:
            self._log(x)

    def write(self, has_ended: bool = False) -> None:
        """Writes all findings to the run's folder.

        Args:
            has_ended: Whether the run has ended (default: False).
        """
        content = {
            "measurements": sum(each.measurements for each in self._optimizers.values()),
            "seconds": time.monotonic() - self._started,
            "has_ended": has_ended,
            "findings": [each.as_row() for each in self.findings],
        }
        self._publisher.each(write_findings, content)

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        return {name: each.engine.state() for name, each in self._optimizers.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        for name, saved in state.items():
            if name in self._optimizers:
                self._optimizers[name].engine.restore(saved)

    def _report(self, findings: Sequence[Finding], x: int) -> None:
        if not findings:
            return
        self._has_unlogged_findings = True
        self._printed.update(
            {_recurrence_key(each) for each in findings if self._is_reported(each)}
        )
        printed = [each for each in findings if self._is_printed(each)]
        if not printed:
            return
        is_info = all(each.severity is Severity.info for each in printed)
        (log_info if is_info else log_warning)(describe_raised(printed))
        if self._config.alert:
            for finding in printed:
                self._publisher.each(alert, f"Adam: {finding.code}", describe_raised([finding]))
        stopping = [each.code for each in printed if self._stops(each)]
        if stopping:
            self.should_stop = True
            log_info(f"AdamMonitor stops the run: {stopping[0]} is in stop_on.")
        self._log(x)

    def _stops(self, finding: Finding) -> bool:
        """Whether a finding stops the run: in `stop_on`, and not downgraded to info by its rule."""
        if finding.is_notice or finding.code not in self._config.stop_on:
            return False
        rule = self._optimizers[finding.optimizer].engine.rules[finding.code]
        return finding.is_above_info or rule.severity is Severity.info

    def _is_reported(self, finding: Finding) -> bool:
        return finding.is_above_info or self._stops(finding)

    def _is_printed(self, finding: Finding) -> bool:
        """Whether to print a finding: not `info`, and not printed too often."""
        return self._is_reported(finding) and self._printed[_recurrence_key(finding)] <= MAX_PRINTED

    def _log(self, x: int) -> None:
        self._has_unlogged_findings = False
        self._publisher.each(log_findings, [each.as_row() for each in self.findings], x)
        self.write()


def _recurrence_key(finding: Finding) -> tuple[str, str, str]:
    """Identifies recurring findings."""
    return finding.code, finding.scope, finding.optimizer


def low_denominator(
    optimizer: Optimizer, module: nn.Module, measurement: Measurement, scope: str
) -> float | None:
    """Returns the 1st percentile of √v̂ in a scope.

    It covers the parameters of this rank that still have a gradient. None if there are none, or if
    the percentile is below 1e-20.
    """
    states = StateReader(module).after_step(optimizer)
    inside = measurement.tensors_of(scope)
    names = states.scopes.names
    states = states.select([index for index, name in enumerate(names) if name.tensor in inside])
    if not len(states) or not steps_as_adam(optimizer):
        return None
    with torch.no_grad():
        counts = kernels.count_exponents(states, [0] * len(states), 1)[0]
    return magnitude_above(counts[DENOMINATOR_POSITION].tolist(), HARMLESS)
