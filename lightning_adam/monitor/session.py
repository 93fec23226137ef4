"""`MonitorSession`: the work of `AdamMonitor` during one run."""

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import (
    log_every_n_steps,
    logging_step,
    loss_of_batch,
    parameter_root,
)
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.monitor.cadence import Cadence
from lightning_adam.monitor.failsafe import Failsafe
from lightning_adam.monitor.finding_reporter import FindingReporter
from lightning_adam.monitor.flight_recorder.recorder import FlightRecorder
from lightning_adam.monitor.gradient_processing import GradientProcessing
from lightning_adam.monitor.pending import AsyncHostCopy, has_arrived_by
from lightning_adam.monitor.preconditions import announce_compilation, torch_optimizers
from lightning_adam.monitor.publishing import Publisher, log_location, log_settings
from lightning_adam.monitor.row_log import RowLog
from lightning_adam.monitor.run_facts import run_settings
from lightning_adam.monitor.tracked_optimizer import TrackedOptimizer
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.names import optimizer_names
from lightning_adam.statistics.sharding import is_sharded, largest_over_ranks
from lightning_adam.statistics.state_reader import is_measurable

EXCEPTION_WAIT_S = 1.0
"""How long to wait for measurements after an exception, as the device may never answer."""


class MonitorSession:
    """Tracks the optimizers of one run, and logs their measurements.

    Args:
        config: The monitor's config.
        path: Config path of the monitor.
        trainer: The trainer.
    """

    def __init__(self, config: MonitorConfig, path: ConfigPath, trainer: Trainer) -> None:
        self._config = config
        self._path = path
        self._trainer = trainer
        self.failsafe = Failsafe(self._disable)
        self.tracked: list[TrackedOptimizer] = []
        self.reporter: FindingReporter | None = None
        self._publisher = Publisher(trainer)
        self._rows = RowLog(config, trainer, self._publisher, self.failsafe)
        self._queue = self._rows.queue
        self._recorder: FlightRecorder | None = None
        self._gradients = GradientProcessing(trainer)
        self._batches = 0

    def start(self, module: LightningModule, saved: Mapping[str, Any]) -> None:
        """Adds hooks to the optimizers. A checkpoint has restored their state by now.

        Args:
            module: The module that is trained.
            saved: The loaded state; empty if there is none.
        """
        self.failsafe.start()
        with self.failsafe.guard():
            self._start(module, saved)
        with self.failsafe.guard():
            self._synchronize_start()

    def before_step(self, optimizer: Optimizer) -> None:
        """Prepares a step of an optimizer."""
        for tracked in self.tracked:
            if tracked.optimizer is optimizer:
                self.failsafe.call(tracked.before_step)

    def after_batch(self, outputs: Any) -> None:
        """Logs the measurements that have arrived.

        Args:
            outputs: The output of `training_step`.
        """
        call, has_measured = self.failsafe.call, False
        for tracked in self.tracked:
            call(tracked.counter.close)
            if tracked.measured:
                has_measured = True
        if has_measured or self._queue:
            call(partial(self._log_batch, outputs))
        if self._recorder is not None and self.failsafe.is_active:
            call(partial(self._record_batch, outputs))
        if self._config.stop_on:
            self._stop_all_ranks()

    def finish(self, exception: BaseException | None = None) -> dict[str, Any]:
        """Logs the remaining measurements, removes the hooks, and returns the state.

        Args:
            exception: The exception that ended the run. Measurements may then never arrive, so the
                wait for them is short (default: None, the run is complete).
        """
        is_complete = exception is None
        wait_s = math.inf if is_complete else EXCEPTION_WAIT_S
        if not is_complete:
            self.failsafe.stop_contacting_ranks()
        if self._recorder is not None and self.failsafe.is_active:
            with self.failsafe.guard():
                if exception is None:
                    self._disable_if_failed(self._recorder.settle())
                else:
                    self._recorder.write_on_exception(exception, wait_s)
        with self.failsafe.guard():
            self._rows.log_arrived(wait_s, may_wait=is_complete)
            self._rows.log_layers()
            self._settle(wait_s)
            if self.reporter is not None and self.failsafe.is_active:
                self.reporter.finish(logging_step(self._trainer))
            if not self._rows.is_empty:
                self._publisher.each(log_location)
        if self.reporter is not None:
            # Even if the monitor is disabled.
            with self.failsafe.guard():
                self.reporter.write(has_ended=True)
        state = self.state()
        self._untrack()
        self.failsafe.stop()
        return state

    def state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint: step counts, findings and unsent rows."""
        steps = {each.name: [each.counter.taken, each.counter.skipped] for each in self.tracked}
        findings = {} if self.reporter is None else self.reporter.state()
        return {"steps": steps, **self._rows.state(), "findings": findings}

    def settled_state(self) -> dict[str, Any]:
        """Waits for the device, which may have skipped steps, and returns the state."""
        for tracked in self.tracked:
            tracked.counter.resolve_skipped()
        return self.state()

    def _start(self, module: LightningModule, saved: Mapping[str, Any]) -> None:
        config, trainer = self._config, self._trainer
        # 0 means never.
        interval = config.every_n_steps or log_every_n_steps(trainer)
        is_logging = interval or config.histograms_every_n_steps
        optimizers = torch_optimizers(trainer)
        if not (is_logging or config.flight_recorder) or not any(map(is_measurable, optimizers)):
            return
        names = optimizer_names(optimizers, module)
        root = parameter_root(trainer, module)
        if config.findings is not None:
            self.reporter = FindingReporter(config, self._path, self._publisher, root, interval)
            self._rows.reporter = self.reporter
        if config.flight_recorder:
            self._recorder = FlightRecorder(config, trainer, self._publisher)
        cadence = Cadence(interval, config.histograms_every_n_steps)
        for optimizer, name in zip(optimizers, names, strict=True):
            if is_measurable(optimizer):
                self._track(optimizer, name, root, cadence)
        self._resume(saved)
        if is_logging:
            settings = run_settings(trainer, root, optimizers, names)
            if config.findings != {}:
                settings["findings"] = config.findings
            self._publisher.each(log_settings, settings)
        if self.reporter is not None:
            self.reporter.start(trainer, module, logging_step(trainer))
        announce_compilation(self.tracked, config.kernel.value)

    def _track(self, optimizer: Optimizer, name: str, root: nn.Module, cadence: Cadence) -> None:
        config = self._config
        statistics = AdamStatistics(
            statistics=config.statistics,
            scopes=config.scopes,
            worst=config.worst,
            layer_depth=config.layer_depth,
            module=root,
            optimizer_name=name or None,
            kernel=config.kernel,
            rule_statistics=[] if self.reporter is None else self.reporter.track(optimizer, name),
        )
        tracked = TrackedOptimizer(
            optimizer, name, statistics, cadence, self.failsafe, self._gradients
        )
        after_step = tracked.after_step
        if self._recorder is not None:
            self._recorder.track(optimizer, name, root, tracked.counter)
            after_step = partial(self._record_step, self._recorder, tracked)
        tracked.counter.attach(after_step, guard=self.failsafe.call)
        self.tracked.append(tracked)

    def _resume(self, saved: Mapping[str, Any]) -> None:
        steps = saved.get("steps", {})
        for tracked in self.tracked:
            if tracked.name in steps:
                taken, skipped = steps[tracked.name]
                tracked.resume(taken, skipped, measures_first=self.reporter is not None)
        self._rows.start([each.name for each in self.tracked[0].statistics.statistics], saved)
        if self.reporter is not None:
            self.reporter.restore(saved.get("findings", {}))

    def _synchronize_start(self) -> None:
        """If ranks measure together, makes all start from the same step, or none."""
        optimizers = [each for each in torch_optimizers(self._trainer) if is_measurable(each)]
        if not any(map(is_sharded, optimizers)):
            return
        taken = [float(each.counter.taken) for each in self.tracked]
        taken += [0.0] * (len(optimizers) - len(taken))
        rank = -math.inf if self.failsafe.is_active else -float(self._trainer.global_rank)
        device = self._trainer.strategy.root_device
        first, *taken = largest_over_ranks([rank, *taken], device)
        if first > -math.inf:
            self.failsafe.disable(int(-first))
            self._untrack()
        for tracked, steps in zip(self.tracked, taken, strict=False):
            tracked.count_from(int(steps))

    def _record_step(self, recorder: FlightRecorder, tracked: TrackedOptimizer) -> None:
        try:
            recorder.after_step(tracked.name, self.failsafe)
        finally:
            # Even on an error, as other ranks may wait for this measurement.
            tracked.after_step()

    def _record_batch(self, outputs: Any) -> None:
        if self._recorder is not None:
            self._disable_if_failed(self._recorder.after_batch(outputs))

    def _disable_if_failed(self, failed_rank: int | None) -> None:
        if failed_rank is not None:
            self.failsafe.disable(failed_rank)

    def _log_batch(self, outputs: Any) -> None:
        loss = loss_of_batch(self._trainer, outputs)
        steps = [step for tracked in self.tracked for step in tracked.send(loss)]
        if steps:
            self.failsafe.check_other_ranks()
            if self.failsafe.is_active:
                self._rows.append(steps)
        self._rows.log_arrived()

    def _stop_all_ranks(self) -> None:
        """Stops the run on all ranks if one of them has a finding of `stop_on`.

        All ranks take part, even if the monitor is disabled.
        """
        trainer = self._trainer
        stops = self.reporter is not None and self.reporter.should_stop
        self._batches += 1
        if trainer.world_size > 1:
            interval = self._config.every_n_steps or log_every_n_steps(trainer) or 1
            if self._batches % interval:
                return
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if stops:
            trainer.should_stop = True

    def _settle(self, wait_s: float) -> None:
        """Counts the steps that the device has skipped, if it answers in time."""
        deadline = time.monotonic() + wait_s
        for counter in (each.counter for each in self.tracked):
            counter.close()
            if counter.flags is not None:
                copy = AsyncHostCopy([counter.flags])
                if math.isinf(wait_s) or has_arrived_by(copy, deadline):
                    counter.apply_device_skips(int(copy.tensors()[0]))

    def _disable(self) -> None:
        if self._recorder is not None:
            self._recorder.clear()
        for tracked in self.tracked:
            tracked.disable()
        self._rows.clear()

    def _untrack(self) -> None:
        for tracked in self.tracked:
            tracked.counter.remove()
        self.tracked = []
