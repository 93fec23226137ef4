"""AdamMonitor: decides when to measure, for which scopes, and where to log."""

import math
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.lightning import (
    AnyCallback,
    holder_of_parameters,
    log_every_n_steps,
    logging_step,
    loss_of_batch,
)
from lightning_adam._compat.torch import is_flattened
from lightning_adam.config.errors import ConfigError, ConfigPath
from lightning_adam.config.monitor import Kernel, Scope
from lightning_adam.config.parsing import locate
from lightning_adam.findings.finding import Finding
from lightning_adam.monitor.failsafe import warn_only
from lightning_adam.monitor.finding_reporter import Judge
from lightning_adam.monitor.flight_recorder.recorder import FlightRecorder
from lightning_adam.monitor.log_keys import X_AXIS
from lightning_adam.monitor.loggers import (
    ROWS_AT_ONCE,
    LayerTable,
    is_wandb,
    log_exponents,
    log_values,
    takes_histograms,
    warn_without_logger,
)
from lightning_adam.monitor.settings import monitor_config
from lightning_adam.optim.console import log_info
from lightning_adam.optim.optimizers import optimizer_settings
from lightning_adam.optim.schedulers import scheduler_settings
from lightning_adam.optim.steps import StepCounter, next_due
from lightning_adam.statistics.accumulators import Knowledge
from lightning_adam.statistics.kernels import FAST, is_installed
from lightning_adam.statistics.kernels import missing as missing_kernels
from lightning_adam.statistics.measurement import Arriving, Measurement
from lightning_adam.statistics.metric import AdamStatistics
from lightning_adam.statistics.names import optimizer_names
from lightning_adam.statistics.selection import KERNEL_PACKAGES
from lightning_adam.statistics.sharding import is_sharded, largest_over_ranks, this_rank
from lightning_adam.statistics.views import is_measurable
from lightning_adam.version import __version__


@dataclass
class _Watched:
    """One optimizer, how far it has come, and what waits to be logged."""

    optimizer: Optimizer
    name: str
    """Empty if it is the only one."""
    statistics: AdamStatistics
    counter: StepCounter
    due: int
    is_sharded: bool
    """Whether all ranks measure together."""
    has_statistics: bool = False
    has_histograms: bool = False
    is_first: bool = False
    """Whether it is the first step after a checkpoint was loaded that was measured last: it is
    judged, whether or not it is logged."""
    is_resumed: bool = False
    """Whether that step is still to come."""
    step: int = 0
    """The number of the step that was last measured, if the device has skipped no more steps than
    `counter.applied_flags`."""
    flags: tuple[Tensor, ...] = ()
    """Of that step, how many the device had skipped, and whether it skipped this one too; empty if
    it could not."""
    is_introduced: bool = False
    abstains: bool = False
    """Whether this rank takes part in the others' measurements with nothing: they wait for it."""

    @property
    def is_waiting(self) -> bool:
        """Whether something of the batch waits to be logged or judged."""
        return self.has_statistics or self.has_histograms or self.is_first


class _Sent(NamedTuple):
    """What one optimizer's step has left, on its way to the loggers."""

    watched: _Watched
    arriving: Arriving
    has_statistics: bool
    has_histograms: bool
    is_first: bool
    step: int
    learned: int
    """How many skipped steps `step` does not count."""


class _Row(NamedTuple):
    """What is logged together."""

    step: int
    """On the x-axis."""
    sent: list[_Sent]

    def has_arrived(self) -> bool:
        """Whether it can be logged without waiting for the device."""
        return all(each.arriving.has_arrived() for each in self.sent)


class AdamMonitor(AnyCallback):
    """Measures Adam right after its steps, and logs to every logger of the trainer.

    It reads the clipped, unscaled gradient, the new parameters and the new state in the optimizer's
    step-post-hook, where all three stand together. It changes nothing that it reads; a fault inside
    it is reported once and switches it off. The numbers are also in `trainer.callback_metrics`.
    Where parameters or state are sharded, all ranks measure together, and each gets the numbers of
    the whole.

    Args:
        every_n_steps: Measure the first optimizer step and every n-th (default: None, the
            trainer's `log_every_n_steps`).
        scopes: What the statistics are given for: `model`, `group`, `layer`, `tensor` (default: the
            model and its parameter groups).
        statistics: What is measured: `headline`, `all`, or names and globs, as in
            `["headline", "eps_*", "update/*"]` (default: headline).
        layer_depth: Parts of a module's path that make a layer, at least 1 (default: None, all).
        worst: How many tensors to show of those with a statistic's largest values, whatever the
            scopes, as in `{"eps_energy_loss": 5}` (default: none).
        histograms_every_n_steps: Count gradients, moments, denominators and directions by binary
            exponent at the first optimizer step and every n-th; W&B and TensorBoard draw them
            (default: None, never).
        layer_table: Keep the statistics of every layer in the W&B table `adam_layers` too (default:
            False).
        findings: Settings of the rules that say what is wrong: thresholds, `persistence` and
            `severity` by code, as in `{"eps_dominates": {"threshold": 0.2}}`; None looks for
            nothing (default: {}, all rules as they are declared).
        stop_on: Codes of findings that end the training when they are raised, as in
            `["not_finite"]` (default: none).
        alert: Send a W&B alert for each finding above info, if the run is online (default: False).
        flight_recorder: How many of the last optimizer steps are kept in memory with all statistics
            of every layer, to be written to `adam_flight_recorder/` in the run's folder if the
            training blows up: a loss that jumps or is not finite, anything measured that is not
            finite, an exception, SIGTERM (default: None, off).
        kernel: What reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager` anywhere, at
            many times the cost (default: `auto`, the fast one if it is installed).

    Raises:
        ConfigError: If an argument cannot work or, when `fit` starts, if no optimizer is of Adam's
            family, the kernel is not one for the device of their parameters, or FSDP1 has replaced
            these by flat ones.

    Example:
        >>> monitor = AdamMonitor(every_n_steps=10, statistics=["headline", "eps_*"])
        >>> trainer = Trainer(callbacks=[monitor], logger=False)
    """

    config_path: ClassVar[ConfigPath | None] = None
    """The place of the arguments, for errors; None: a Hydra app's or a call's."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        scopes: Sequence[str] = (Scope.model.value, Scope.group.value),
        statistics: str | Sequence[str] = "headline",
        layer_depth: int | None = None,
        worst: Mapping[str, int] | None = None,
        histograms_every_n_steps: int | None = None,
        layer_table: bool = False,
        findings: Mapping[str, Mapping[str, Any]] | None = MappingProxyType({}),
        stop_on: Sequence[str] = (),
        alert: bool = False,
        flight_recorder: int | None = None,
        kernel: str = "auto",
    ) -> None:
        arguments = {
            "every_n_steps": every_n_steps,
            "scopes": scopes,
            "statistics": statistics,
            "layer_depth": layer_depth,
            "worst": {} if worst is None else worst,
            "histograms_every_n_steps": histograms_every_n_steps,
            "layer_table": layer_table,
            "findings": None if findings is None else dict(findings),
            "stop_on": stop_on,
            "alert": alert,
            "flight_recorder": flight_recorder,
            "kernel": kernel,
        }
        self._path = self.config_path or locate(arguments, "adam_monitor")
        self.config = monitor_config(arguments, self._path)
        self._interval = 0
        self._watched: list[_Watched] = []
        self._counters: list[StepCounter] = []
        self._layers = LayerTable([])
        self._rows: deque[_Row] = deque()
        self._judge: Judge | None = None
        self._loss: Tensor | None = None
        """That of the batch, where the module has said it."""
        self._recorder: FlightRecorder | None = None
        self._is_off = False
        self._has_failed = False
        """Whether it is off because of this rank."""
        self._fault = ""
        """What has failed on this rank and was not told yet: another may have to tell the same."""
        self._saved: dict[str, Any] = {}
        """The state that was loaded; after a training, that of its end."""

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the training, or was with the last one, in the order of the steps."""
        return [] if self._judge is None else self._judge.findings

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what an earlier call of the trainer has loaded or left."""
        if stage == "fit":
            self._saved = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be measured, and says what cannot be shown, before the first step."""
        others = [type(each).__name__ for each in trainer.optimizers if not is_measurable(each)]
        wrapped = [each for each in trainer.optimizers if not isinstance(each, Optimizer)]
        if wrapped:
            rank_zero_warn(
                f"AdamMonitor cannot measure {type(wrapped[0]).__name__}, which is not a torch"
                " optimizer: DeepSpeed keeps parameters, gradients and state in its own partitions."
                " FSDP2 (ModelParallelStrategy) is supported."
            )
        elif len(others) == len(trainer.optimizers):
            raise ConfigError(
                "AdamMonitor needs an Adam-like optimizer, with betas. The model trains with"
                f" {', '.join(others) or 'no optimizer'}",
                "Use torch.optim.Adam or AdamW (AdamMixin builds them), or remove the callback",
            )
        if any(map(is_flattened, _parameters(trainer.optimizers))):
            raise ConfigError(
                "AdamMonitor needs the original parameters, and FSDP1 trains flat ones",
                "Use FSDPStrategy(use_orig_params=True), or remove the callback",
            )
        self._check_kernel(trainer)
        if others and not wrapped:
            log_info(f"AdamMonitor does not measure {', '.join(others)}: without betas.")
        warn_without_logger(trainer)
        if (
            trainer.loggers
            and self.config.histograms_every_n_steps
            and not any(map(takes_histograms, trainer.loggers))
        ):
            rank_zero_warn("AdamMonitor's histograms need a WandbLogger or a TensorBoardLogger.")
        if self.config.layer_table and not any(map(is_wandb, trainer.loggers)):
            rank_zero_warn("AdamMonitor's layer_table needs a WandbLogger.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks into the optimizers; a checkpoint's state has been restored by now."""
        self._is_off, self._has_failed, self._fault = False, False, ""
        with self._never_harm():
            self._begin(trainer, pl_module)
        with self._never_harm():
            self._begin_alike(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Marks that a step is due, which a GradScaler may still skip."""
        for watched in self._watched:
            if watched.optimizer is optimizer:
                self._guard(watched.counter.expect)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps counted, and the rows that were not sent yet."""
        with self._never_harm():
            if self._watched:
                return self._state()
        return self._saved

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint has kept, till training starts."""
        self._saved = state_dict

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs what the batch's optimizer steps have left, under the step of the batch's loss."""
        for watched in self._watched:
            self._guard(watched.counter.close)
        if self._rows or any(watched.is_waiting for watched in self._watched):
            with self._never_harm():
                self._loss = loss_of_batch(trainer, outputs)
                self._send(trainer)
                while self._rows and self._rows[0].has_arrived():
                    self._log(trainer, self._rows.popleft())
        if self.config.stop_on:
            self._stop_alike(trainer, batch_idx)
        if self._recorder is not None and not self._is_off:
            with self._never_harm():
                self._leave_with(self._recorder.after_batch(trainer, outputs))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends what is left of the layers' table, and lets go of the optimizers."""
        self._finish(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes what the flight recorder holds, sends the layers' table, lets go."""
        if self._recorder is not None and not self._is_off:
            with self._never_harm():
                self._recorder.crash(trainer, exception)
        self._finish(trainer)

    def _check_kernel(self, trainer: Trainer) -> None:
        """A kernel that was asked for by name has to have something to measure."""
        kernel = self.config.kernel.value
        if kernel not in KERNEL_PACKAGES:
            return
        if not is_installed(kernel):
            problem = f"does not work here: pip install --upgrade {KERNEL_PACKAGES[kernel]}"
            raise (self._path / "kernel").invalid(kernel, problem, "auto")
        types = _device_types(filter(is_measurable, trainer.optimizers))
        if kernel not in {FAST.get(each) for each in types}:
            problem = f"does not support the device of the parameters, {', '.join(sorted(types))}"
            raise (self._path / "kernel").invalid(kernel, problem, "auto")

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # 0 is Lightning's word for never.
        self._interval = self.config.every_n_steps or log_every_n_steps(trainer)
        is_logging = self._interval or self.config.histograms_every_n_steps
        if not is_logging and not self.config.flight_recorder:
            return
        if not any(map(is_measurable, trainer.optimizers)):
            return
        names = optimizer_names(trainer.optimizers, pl_module)
        module = holder_of_parameters(trainer, pl_module)
        if self.config.findings is not None:
            self._judge = Judge(self.config, module, self._interval)
        if self.config.flight_recorder:
            self._recorder = FlightRecorder(self.config)
        for optimizer, name in zip(trainer.optimizers, names, strict=True):
            if is_measurable(optimizer):
                self._watch(optimizer, name, module)
        statistics = [each.name for each in self._watched[0].statistics.statistics]
        self._layers = LayerTable([X_AXIS, "optimizer", "layer", *statistics])
        self._resume()
        if is_logging:
            _log_settings(trainer, names)
        if self._judge is not None:
            self._judge.begin(trainer, pl_module)

    def _begin_alike(self, trainer: Trainer) -> None:
        """Where ranks measure together, all count from the same step, or none begins."""
        optimizers = [each for each in trainer.optimizers if is_measurable(each)]
        if not any(map(is_sharded, optimizers)):
            return
        taken = [float(each.counter.taken) for each in self._watched]
        taken += [0.0] * (len(optimizers) - len(taken))
        failed = [-float(trainer.global_rank) if self._is_off else -math.inf]
        (first, *taken) = largest_over_ranks([*failed, *taken], trainer.strategy.root_device)
        if first > -math.inf:
            self._leave(int(-first))
            self._watched = []
        for watched, steps in zip(self._watched, taken, strict=False):
            watched.counter.taken = int(steps)
            watched.due = self._first_due(watched)

    def _finish(self, trainer: Trainer) -> None:
        if self._recorder is not None and not self._is_off:
            with self._never_harm():
                self._leave_with(self._recorder.settle(trainer))
        with self._never_harm():
            while self._rows:
                self._log(trainer, self._rows.popleft())
            if self._layers.rows:
                self._layers.send(trainer.loggers, logging_step(trainer))
            if self._watched:
                self._saved = self._state()
                if self._judge is not None:
                    self._judge.finish(trainer)
        if self._fault and self._watched:
            self._leave(trainer.global_rank)
        self._switch_off()
        self._watched = []
        for counter in self._counters:
            counter.remove()
        self._counters = []
        self._recorder = None

    def _state(self) -> dict[str, Any]:
        for watched in self._watched:
            watched.counter.settle()
        steps = {each.name: [each.counter.taken, each.counter.skipped] for each in self._watched}
        findings = {} if self._judge is None else self._judge.state()
        layers = [self._layers.columns, self._layers.rows]
        return {"steps": steps, "layers": layers, "findings": findings}

    def _resume(self) -> None:
        """Counts on from where a checkpoint stands, if one was loaded."""
        steps, layers = self._saved.get("steps", {}), self._saved.get("layers", [[], []])
        for watched in self._watched:
            if watched.name in steps:
                watched.counter.taken, watched.counter.skipped = steps[watched.name]
                watched.is_resumed = self._judge is not None and watched.counter.taken > 0
                watched.due = self._first_due(watched)
        if layers[0] == self._layers.columns:
            self._layers.rows = list(layers[1])
        if self._judge is not None:
            self._judge.restore(self._saved.get("findings", {}))

    def _watch(self, optimizer: Optimizer, name: str, module: nn.Module) -> None:
        statistics = AdamStatistics(
            statistics=self.config.statistics,
            scopes=self.config.scopes,
            worst=self.config.worst,
            layer_depth=self.config.layer_depth,
            module=module,
            optimizer_name=name or None,
            kernel=self.config.kernel,
            judged=[] if self._judge is None else self._judge.watch(optimizer, name),
        )
        together = is_sharded(optimizer)
        counter = StepCounter(optimizer, is_sharded=together)
        due = self._next_due(counter.taken)
        watched = _Watched(optimizer, name, statistics, counter, due, together)
        if self._recorder is not None:
            self._recorder.watch(optimizer, name, module, counter)
        counter.attach(lambda: self._after_step(watched), guard=self._guard)
        self._watched.append(watched)
        self._counters.append(counter)

    def _guard(self, hook: Callable[[], None]) -> None:
        """Calls what belongs to a step; `_never_harm` would cost more than all else in between."""
        # The hooks outlive a fault.
        if self._watched:
            try:
                hook()
            except Exception:
                self._report()

    def _after_step(self, watched: _Watched) -> None:
        try:
            if self._recorder is not None:
                self._recorder.after_step(watched.name, watched.abstains, self._has_failed)
        finally:
            # Whatever has happened there, other ranks may wait for this one.
            if watched.counter.taken >= watched.due:
                self._measure(watched)

    def _measure(self, watched: _Watched) -> None:
        counter = watched.counter
        watched.due = self._next_due(counter.taken)
        # What an earlier step of the batch has left is not logged yet.
        watched.has_statistics |= _is_due(counter.taken, self._interval)
        watched.has_histograms |= _is_due(counter.taken, self.config.histograms_every_n_steps)
        watched.is_first, watched.is_resumed = watched.is_resumed, False
        watched.step, watched.flags = counter.taken, counter.found_inf_flags
        due = (watched.optimizer, watched.has_histograms)
        if watched.abstains:
            watched.statistics.abstain(*due, has_failed=self._has_failed)
            if self._fault:
                self._leave(watched.statistics.measurement.failed_rank)
        else:
            watched.statistics.update(*due, counter.all_skipped)

    def _next_due(self, steps: int) -> int:
        """The first optimizer step after `steps` that is 1 or divisible by an interval."""
        intervals = [*filter(None, (self._interval, self.config.histograms_every_n_steps))]
        if not intervals:
            # The flight recorder is all there is.
            return sys.maxsize
        return min(next_due(steps, each) for each in intervals)

    def _first_due(self, watched: _Watched) -> int:
        """The first step that is measured: that after a checkpoint tells if state was lost."""
        taken = watched.counter.taken
        return taken + 1 if watched.is_resumed else self._next_due(taken)

    def _stop_alike(self, trainer: Trainer, batch_idx: int) -> None:
        """Ends the training on all ranks, if a finding on one of them is to.

        All take part, also where the monitoring has failed.
        """
        stops = self._judge is not None and self._judge.should_stop
        interval = self.config.every_n_steps or log_every_n_steps(trainer) or 1
        if trainer.world_size > 1:
            if (batch_idx + 1) % interval:
                return
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if stops:
            trainer.should_stop = True

    def _send(self, trainer: Trainer) -> None:
        """Sends what the batch's steps have left on its way, under the step of the batch's loss."""
        waiting = [watched for watched in self._watched if watched.is_waiting]
        dues = [(each.has_statistics, each.has_histograms, each.is_first) for each in waiting]
        learned = [each.counter.applied_flags for each in waiting]
        for watched in waiting:
            watched.has_statistics = watched.has_histograms = watched.is_first = False
            if watched.is_sharded and watched.flags:
                # What is learned moves the next measurement: at the same time on all ranks.
                watched.counter.apply_device_skips(int(watched.flags[0]))
                watched.due = self._next_due(watched.counter.taken)
        sent = [
            _Sent(each, self._arriving(each), *due, each.step, known)
            for each, due, known in zip(waiting, dues, learned, strict=True)
            if not each.abstains
        ]
        if sent:
            self._rows.append(_Row(logging_step(trainer), sent))

    def _arriving(self, watched: _Watched) -> Arriving:
        loss = () if self._loss is None else (self._loss,)
        return Arriving(watched.statistics.measurement, (*watched.flags, *loss))

    def _log(self, trainer: Trainer, row: _Row) -> None:
        values: dict[str, float] = {}
        exponents: dict[str, list[int]] = {}
        for sent in map(self._settled, row.sent):
            measurement = sent.arriving.measurement()
            if measurement.failed_rank is not None:
                self._leave(measurement.failed_rank)
                return
            if sent.has_statistics:
                values |= measurement.values()
                self._keep_layers(sent.watched, measurement, row.step)
            if self._judge is not None and (sent.has_statistics or sent.is_first):
                told = sent.arriving.others()[len(sent.watched.flags) :]
                loss = told[0] if told else math.nan
                due = (sent.has_statistics, sent.is_first)
                self._judge.judge(trainer, sent.watched.name, measurement, sent.step, loss, *due)
            if sent.has_histograms:
                exponents |= measurement.exponent_counts()
            if (sent.has_statistics or sent.has_histograms) and not sent.watched.is_introduced:
                self._introduce(sent.watched, measurement)
        log_values(trainer, values, row.step)
        for logger in trainer.loggers if exponents else ():
            log_exponents(logger, exponents, row.step)
        if len(self._layers.rows) >= ROWS_AT_ONCE:
            self._layers.send(trainer.loggers, row.step)

    def _settled(self, sent: _Sent) -> _Sent:
        """Takes back what turns out to be of a step that was skipped, or that is not due."""
        flags = sent.arriving.others()[: len(sent.watched.flags)]
        if not flags:
            return sent
        skipped, is_skipped = flags
        step = sent.step - (int(skipped) - sent.learned)
        counter, histograms = sent.watched.counter, self.config.histograms_every_n_steps
        counter.apply_device_skips(int(skipped))
        sent.watched.due = self._next_due(counter.taken)
        return sent._replace(
            has_statistics=sent.has_statistics and not is_skipped and _is_due(step, self._interval),
            has_histograms=sent.has_histograms and not is_skipped and _is_due(step, histograms),
            is_first=sent.is_first and not is_skipped,
            step=step,
        )

    def _keep_layers(self, watched: _Watched, measurement: Measurement, step: int) -> None:
        for row in measurement.table(Scope.layer) if self.config.layer_table else []:
            optimizer = {"optimizer": watched.name} if watched.name else {}
            self._layers.add({X_AXIS: step, **optimizer, **row})

    def _introduce(self, watched: _Watched, measurement: Measurement) -> None:
        """Says once, after the first step, what is not measured of an optimizer, or slowly."""
        watched.is_introduced = True
        name, statistics = type(watched.optimizer).__name__, watched.statistics
        others = statistics.passed_over
        without = "quantised, without an exp_avg of their shape, or with a sparse gradient"
        if measurement.is_empty:
            log_info(
                f"AdamMonitor measures nothing of {name}: all parameters are {without},"
                " or with none that the step has left."
            )
            return
        is_choice_ours = self.config.kernel is Kernel.auto
        for kernel in missing_kernels(_device_types([watched.optimizer])) if is_choice_ours else []:
            log_info(
                f"AdamMonitor measures {name} in many times the time it takes with {kernel}:"
                f" pip install {KERNEL_PACKAGES[kernel]}"
            )
        missing = [each.name for each in statistics.not_measured]
        if self.config.histograms_every_n_steps and Knowledge.STEP not in measurement.knowledge:
            missing.append("histograms")
        if others:
            missing.append(f"{len(others)} parameters {without}, such as {others[0]}")
        if missing:
            log_info(
                f"AdamMonitor measures of {name} what its state tells, not {', '.join(missing)}."
            )

    @contextmanager
    def _never_harm(self) -> Iterator[None]:
        """A fault in monitoring is reported once, ends the monitoring, and never the training."""
        try:
            yield
        except Exception:
            self._report()

    def _report(self) -> None:
        is_known = self._is_off
        self._switch_off()
        if not is_known:
            self._has_failed = True
            self._fault = traceback.format_exc()
            if this_rank() == 0:
                self._leave(0)

    def _leave(self, rank: int | None) -> None:
        """The monitoring has failed, on this rank or on another: the first that has says why."""
        if self._fault and rank == this_rank():
            warn_only(
                "AdamMonitor has failed and is off from here on; training is not affected.\n"
                f"{self._fault}"
            )
        elif not self._is_off and this_rank() == 0:
            warn_only(
                f"AdamMonitor has failed on rank {rank}, which says why, and is off from here on;"
                " training is not affected."
            )
        self._fault = ""
        self._switch_off()

    def _leave_with(self, failed_rank: int | None) -> None:
        """What the flight recorder has learned of the other ranks."""
        if failed_rank is not None:
            self._leave(failed_rank)

    def _switch_off(self) -> None:
        self._is_off = True
        if self._recorder is not None:
            self._recorder.forget()
        # The hooks stay till the end: torch may be going through them at this moment. Where ranks
        # measure together, the others wait for this one.
        for watched in self._watched:
            watched.abstains = watched.is_sharded
            if not watched.is_sharded:
                watched.due = sys.maxsize
        self._watched = [watched for watched in self._watched if watched.is_sharded]
        self._rows.clear()
        self._layers = LayerTable([])


def _parameters(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _device_types(optimizers: Iterable[Optimizer]) -> set[str]:
    """Those of the parameters."""
    return {parameter.device.type for parameter in _parameters(optimizers)}


def _is_due(steps: int, interval: int | None) -> bool:
    return bool(interval and (steps == 1 or steps % interval == 0))


def _log_settings(trainer: Trainer, names: Sequence[str]) -> None:
    """The settings as they were resolved, in the run's config, and how to draw our keys."""
    optimizers = dict(zip(names, map(optimizer_settings, trainer.optimizers), strict=True))
    schedulers = {
        name: scheduler_settings(entry.scheduler)
        for name, optimizer in zip(names, trainer.optimizers, strict=True)
        for entry in trainer.lr_scheduler_configs
        if entry.scheduler.optimizer is optimizer
    }
    config: dict[str, Any] = {
        "version": __version__,
        "optimizer": optimizers.get("", optimizers),
        "scheduler": schedulers.get("", schedulers) or None,
    }
    for logger in trainer.loggers:
        logger.log_hyperparams({"lightning_adam": config})
        if is_wandb(logger):
            logger.experiment.define_metric("adam_*", step_metric=X_AXIS)
