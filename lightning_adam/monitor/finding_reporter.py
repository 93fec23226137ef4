"""Judge: the findings of a training, told of its measurements, and told to whom it concerns."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adam._compat.lightning import is_smoke_test, logging_step
from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.config.monitor import MonitorConfig, Severity
from lightning_adam.findings.finding import Finding
from lightning_adam.findings.preflight import Plan, PlannedGroup, preflight
from lightning_adam.findings.rule import Training
from lightning_adam.findings.showing import closed, raised, summary
from lightning_adam.findings.watch import Watch
from lightning_adam.monitor.loggers import alert, log_findings
from lightning_adam.optim.console import log_info
from lightning_adam.optim.length import steps_of
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.optim.schedulers import scheduler_settings
from lightning_adam.statistics import kernels
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.histograms import DENOMINATOR_POSITION, HARMLESS, magnitude_above
from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import distributed_tensor
from lightning_adam.statistics.views import Views, steps_as_adam

MOST_OFTEN = 3
"""How often the same is said in the console: a finding may come and go."""


@dataclasses.dataclass
class _Accused:
    """One optimizer, and what is found of it."""

    optimizer: Optimizer
    watch: Watch
    training: Training


class Judge:
    """The findings of a training: the console, the loggers and the trainer are told of them.

    Args:
        config: The monitor's.
        module: What is trained, where the parameters are.
        every_n_steps: The steps from one measurement to the next.
    """

    def __init__(self, config: MonitorConfig, module: nn.Module, every_n_steps: int) -> None:
        self._config = config
        self._every_n_steps = every_n_steps
        self._module = module
        self._accused: dict[str, _Accused] = {}
        self._first_loss = math.nan
        self._measurements = 0
        self.should_stop = False
        """Whether a finding was raised that is to end the training."""
        self._has_news = False
        self._told: Counter[tuple[str, str, str]] = Counter()

    @property
    def findings(self) -> list[Finding]:
        """All of them, those that have ceased too."""
        return [finding for each in self._accused.values() for finding in each.watch.all]

    def watch(self, optimizer: Optimizer, name: str) -> list[str]:
        """Begins to watch an optimizer; returns what has to be measured of it.

        Args:
            optimizer: The optimizer.
            name: What tells it from others; empty if it is the only one.
        """
        watch = Watch(self._config.findings, name)
        self._accused[name] = _Accused(optimizer, watch, Training())
        return watch.statistics

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Says what can be known before the first step."""
        foreseen = []
        for accused in self._accused.values():
            accused.training = _training(trainer, module, accused.optimizer, self._every_n_steps)
            plan = _plan(trainer, self._module, accused.optimizer, accused.training)
            foreseen += accused.watch.foresee(preflight(plan, accused.watch.rules))
        self._tell(trainer, foreseen)

    def judge(
        self,
        trainer: Trainer,
        name: str,
        measurement: Measurement,
        step: int,
        loss: float = math.nan,
        is_due: bool = True,
        is_resumed: bool = False,
    ) -> None:
        """Judges a measurement, and tells what it has changed.

        Args:
            trainer: The trainer.
            name: The optimizer's.
            measurement: The measurement.
            step: The optimizer step that it is of.
            loss: The loss of its batch (default: not known).
            is_due: Whether it is measured in any case (default: True).
            is_resumed: Whether it is the first after a checkpoint was loaded (default: False).
        """
        accused = self._accused[name]
        if is_resumed:
            self._tell(trainer, accused.watch.resume(measurement, step, accused.training))
        if not is_due:
            return
        self._measurements += 1
        if not math.isfinite(self._first_loss):
            self._first_loss = loss
        share = loss / self._first_loss if self._first_loss else math.nan
        training = dataclasses.replace(accused.training, loss_share=share)

        def low_denominator(scope: str) -> float | None:
            return _low_denominator(accused.optimizer, self._module, measurement, scope)

        changes = accused.watch.judge(measurement, step, training, low_denominator)
        if changes.closed:
            self._has_news = True
            ceased = [each for each in changes.closed if self._is_told(each)]
            if ceased:
                log_info(closed(ceased))
        self._tell(trainer, changes.raised)

    def finish(self, trainer: Trainer) -> None:
        """Says at the end what was found."""
        if self._measurements:
            log_info(summary(self.findings, self._measurements))
        if self._has_news:
            self._log(trainer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        watches = {name: each.watch.state() for name, each in self._accused.items()}
        return {"first_loss": self._first_loss, "watches": watches}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what a checkpoint has kept."""
        self._first_loss = state.get("first_loss", math.nan)
        for name, watch in state.get("watches", {}).items():
            if name in self._accused:
                self._accused[name].watch.restore(watch)

    def _tell(self, trainer: Trainer, findings: Sequence[Finding]) -> None:
        if not findings:
            return
        self._has_news = True
        self._told.update({_same(each) for each in findings})
        shown = [each for each in findings if self._is_told(each)]
        if not shown:
            return
        log_info(raised(shown))
        if self._config.alert:
            for logger in trainer.loggers:
                for finding in shown:
                    alert(logger, f"Adam: {finding.code}", raised([finding]))
        stopping = [each.code for each in shown if each.code in self._config.stop_on]
        if stopping:
            self.should_stop = True
            log_info(f"AdamMonitor ends the training, as stop_on={stopping[0]} asks for.")
        self._log(trainer)

    def _is_told(self, finding: Finding) -> bool:
        """Whether it matters, and does not come and go: that is summed up at the end."""
        matters = finding.severity is not Severity.info or finding.code in self._config.stop_on
        return matters and self._told[_same(finding)] <= MOST_OFTEN

    def _log(self, trainer: Trainer) -> None:
        self._has_news = False
        rows = [each.as_row() for each in self.findings]
        for logger in trainer.loggers:
            log_findings(logger, rows, logging_step(trainer))


def _same(finding: Finding) -> tuple[str, str, str]:
    """What findings that come again have in common."""
    return finding.code, finding.scope, finding.optimizer


def _low_denominator(
    optimizer: Optimizer, module: nn.Module, measurement: Measurement, scope: str
) -> float | None:
    """What 1 % of the √v̂ of a scope are below.

    Counted over what this rank holds of the parameters that still have their gradients; None if
    there are none, or if it is smaller than any eps that is sensible.
    """
    inside = measurement.tensors_of(scope)
    views = [view for view in Views(module).after_step(optimizer) if view.place.tensor in inside]
    if not views or not steps_as_adam(optimizer):
        return None
    with torch.no_grad():
        counts = kernels.count_exponents(views, [0] * len(views))[0]
    return magnitude_above(counts[DENOMINATOR_POSITION].tolist(), HARMLESS)


def _training(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, every_n_steps: int
) -> Training:
    """What is known of a training before it begins."""
    paths = getattr(module, "config_paths", (ConfigPath("optimizer"), ConfigPath("scheduler")))
    peaks = [_number(peak_lr(group)) for group in optimizer.param_groups]
    steps = None
    if len(trainer.optimizers) == 1 and not is_smoke_test(trainer):
        steps = steps_of(trainer)
    epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return Training(
        defaults={**optimizer.defaults, "lr": _number(optimizer.defaults.get("lr", math.nan))},
        optimizer_path=_with_config(paths[0]),
        scheduler_path=_with_config(paths[1]),
        dtypes=frozenset(dtype_name(each.dtype) for each in parameters),
        peak_lr=max(peaks, default=math.nan),
        total_steps=math.inf if steps is None else steps,
        every_n_steps=every_n_steps,
        steps_per_epoch=epoch if math.isfinite(epoch) else math.nan,
    )


def _with_config(path: ConfigPath) -> ConfigPath:
    """A place whose settings are named with their config, as a finding stands alone."""
    return ConfigPath(path.config) if path.source is Source.PYTHON else path


def _plan(trainer: Trainer, module: nn.Module, optimizer: Optimizer, training: Training) -> Plan:
    """What is about to be trained."""
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
    own = [scheduler_settings(each) for each in schedules if each.optimizer is optimizer]
    return Plan(
        training=training,
        groups=[
            _planned(group_name(group, index), group)
            for index, group in enumerate(optimizer.param_groups)
            if steps_as_adam(optimizer)
        ],
        schedule=own[0] if own else {},
        left_out=_left_out(trainer, module),
    )


def _left_out(trainer: Trainer, module: nn.Module) -> list[str]:
    """The parameters that ask for a gradient and are in no group."""
    groups = [group for each in trainer.optimizers for group in each.param_groups]
    grouped = {id(parameter): parameter for group in groups for parameter in group["params"]}
    own = set(map(id, module.parameters()))
    # After a validation, FSDP2 shows whole parameters in the place of the groups' shards.
    sharded = Counter(
        parameter.shape
        for key, parameter in grouped.items()
        if key not in own and isinstance(parameter, distributed_tensor())
    )
    left_out = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or id(parameter) in grouped:
            continue
        if sharded[parameter.shape]:
            sharded[parameter.shape] -= 1
        else:
            left_out.append(clean_name(name))
    return left_out


def _planned(name: str, group: Mapping[str, Any]) -> PlannedGroup:
    dtypes = {each.dtype for each in group["params"] if each.is_floating_point()}
    eps = float(group["eps"])
    settings = {**group, "lr": _number(peak_lr(group)), "betas": [*map(_number, group["betas"])]}
    return PlannedGroup(
        name,
        {key: value for key, value in settings.items() if key != "params"},
        {dtype_name(dtype): 0.0 if rounds_to_0(eps, dtype) else eps for dtype in dtypes},
        {dtype_name(dtype): torch.finfo(dtype).eps for dtype in dtypes},
    )


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)
