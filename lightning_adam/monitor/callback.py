"""`AdamMonitor`: the callback that measures Adam during training."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adam._compat.lightning import AnyCallback
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.monitor import Scope
from lightning_adam.config.parsing import locate
from lightning_adam.findings.finding import Finding
from lightning_adam.monitor import preconditions
from lightning_adam.monitor.session import MonitorSession
from lightning_adam.monitor.settings import monitor_config


class AdamMonitor(AnyCallback):
    """Measures Adam right after its steps, and logs to all loggers of the trainer.

    `AdamMonitor` reads the clipped, unscaled gradient, the new parameters and the new state in the
    optimizer's step-post-hook, and changes none of them. On an internal error it warns once and
    disables itself. The statistics are also in `trainer.callback_metrics`. If parameters or state
    are sharded, all ranks measure together, and each gets the statistics of the whole model.

    Args:
        every_n_steps: Measure the first optimizer step and every n-th (default: None, the
            trainer's `log_every_n_steps`).
        scopes: Sets of tensors to describe: `model`, `group`, `layer`, `tensor` (default: the
            model).
        statistics: Statistics to measure: `headline`, `all`, or names and globs, as in
            `["headline", "eps_*", "update/*"]` (default: headline). `beta1`, `beta2`, `eps` and
            `weight_decay` are only logged when they change.
        layer_depth: Number of parts of a module's path that form a layer's name, at least 1
            (default: None, all).
        worst: Number of tensors to log with the largest values of a statistic, independent of
            `scopes`, as in `{"eps_energy_loss": 5}`. W&B, CSV and TensorBoard also get their names
            (default: none).
        histograms_every_n_steps: Count gradients, moments, denominators and normalized updates by
            binary exponent at the first optimizer step and every n-th. W&B and TensorBoard draw
            them; every logger gets percentiles of denominators and normalized updates (default:
            None, never).
        layer_table: Also log the statistics of every layer to the W&B table `adam_layers`
            (default: False).
        findings: Settings of the rules by name: thresholds, `patience` and `severity`, as in
            `{"eps_dominates": {"threshold": 0.2}}`; None disables all rules (default: {}, no
            changes).
        stop_on: Findings that stop training, as in `["not_finite"]` (default: none).
        alert: Send a W&B alert for each finding above info, if the run is online (default: False).
        flight_recorder: Number of optimizer steps whose layer statistics are kept in memory. They
            are written to `adam_flight_recorder/` in the run's folder on a failure: a loss that
            jumps, a loss or statistic that is not finite, an exception, SIGTERM (default: None,
            off).
        kernel: Implementation that reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager`
            on any device, many times slower (default: `auto`, the fast one if it is installed).

    Raises:
        ConfigError: If an argument is invalid or, when `fit` starts, if no optimizer is of Adam's
            family, the kernel does not support the device of the parameters, or FSDP1 has replaced
            the parameters by flat ones.

    Example:
        >>> monitor = AdamMonitor(every_n_steps=10, statistics=["headline", "eps_*"])
        >>> trainer = Trainer(callbacks=[monitor], logger=False)
    """

    config_path: ClassVar[ConfigPath | None] = None
    """Config path of the arguments, for errors (default: None, found from the call)."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        scopes: Sequence[str] = (Scope.model.value,),
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
        self._session: MonitorSession | None = None
        """None outside of a run."""
        self._findings: list[Finding] = []
        """The findings of the last run."""
        self._saved: dict[str, Any] = {}
        """The loaded state; after a run, its last state."""

    @property
    def findings(self) -> list[Finding]:
        """The findings of the run, or of the last one, in the order of their steps."""
        reporter = None if self._session is None else self._session.reporter
        return self._findings if reporter is None else reporter.findings

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Discards the state of an earlier run."""
        if stage == "fit":
            self._saved, self._findings = {}, []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises if nothing can be measured, and reports what will not be measured or logged."""
        preconditions.check(trainer, self.config, self._path)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds hooks to the optimizers. A checkpoint has restored their state by now."""
        self._session = MonitorSession(self.config, self._path, trainer)
        self._session.start(pl_module, self._saved)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Prepares a step, and measures its gradient before clipping if the step is due."""
        if self._session is not None:
            self._session.before_step(optimizer)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the measurements that have arrived on the host."""
        if self._session is not None:
            self._session.after_batch(outputs)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the remaining measurements, and removes the hooks."""
        self._finish()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes the flight recorder's file, logs what has arrived, and removes the hooks."""
        self._finish(exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint: step counts, findings and unsent rows."""
        session = self._session
        if session is not None and session.tracked:
            with session.failsafe.guard():
                return session.settled_state()
        return self._saved

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._saved = state_dict

    def _finish(self, exception: BaseException | None = None) -> None:
        session, self._session = self._session, None
        if session is not None:
            is_tracking = bool(session.tracked)
            state = session.finish(exception)
            self._findings = [] if session.reporter is None else session.reporter.findings
            self._saved = state if is_tracking else self._saved
