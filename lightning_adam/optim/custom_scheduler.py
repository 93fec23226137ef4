"""A scheduler of any class, which is rebuilt when its length or peak changes."""

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import target_name
from lightning_adam.config.schedule import TOTAL_STEPS, CustomSchedulerConfig, uses_total_steps
from lightning_adam.optim.console import log_info
from lightning_adam.optim.optimizers import call_target
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.optim.shapes import RunLength, endless_run_error
from lightning_adam.optim.steps import StepCounter, steps_taken

PLATEAU_PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""Attributes in which `ReduceLROnPlateau` tracks its metric."""


if TYPE_CHECKING:
    _Scheduler = LRScheduler
else:
    _Scheduler = object


class _ClampedOneCycle(_Scheduler):
    """Keeps the last learning rate of OneCycleLR, where torch extrapolates and then raises."""

    def get_lr(self) -> list[Any]:
        total_steps = vars(self)["total_steps"]
        if self.last_epoch < total_steps:
            return super().get_lr()
        if self.last_epoch == total_steps + 1:
            rank_zero_warn(
                f"OneCycleLR has ended after {total_steps} steps, but the run continues with its"
                " last learning rate. To avoid this, set total_steps to the length of the run."
            )
        return [group["lr"] for group in self.optimizer.param_groups]


class CustomSchedule(_Scheduler):
    """A scheduler of any class, which is rebuilt when its length or peak changes.

    Most schedulers compute each learning rate from the previous one, and take their length as an
    argument. For another length or peak, a new scheduler repeats the steps of the old one.
    `create` returns an instance that is also an instance of the configured class.
    """

    position: int
    """Number of steps that the scheduler took."""
    interval: str
    """Unit of a step, `step` or `epoch`; empty if it is unknown."""
    counter: StepCounter | None
    length: RunLength
    path: ConfigPath
    _config: CustomSchedulerConfig
    _factory: functools.partial[Any]
    _peaks: list[Any]

    @classmethod
    def create(
        cls,
        optimizer: Optimizer,
        config: CustomSchedulerConfig,
        path: ConfigPath,
        length: RunLength,
    ) -> "CustomSchedule":
        """Builds the scheduler.

        Args:
            optimizer: The optimizer. The learning rate of each group is that group's peak.
            config: The config with the scheduler's class and arguments.
            path: Its path.
            length: The length of the run.
        """
        betas = [group.get("betas") for group in optimizer.param_groups]
        peaks = [copy_lr(group["lr"]) for group in optimizer.param_groups]
        built = _build_custom(optimizer, config, config.factory, path, length)
        _derive(built, cls)
        vars(built).update(
            position=0,
            interval="",
            counter=None,
            length=length,
            path=path,
            _config=config,
            _factory=config.factory,
            _peaks=peaks,
        )
        schedule = cast("CustomSchedule", built)
        schedule._warn_of_overwritten_settings(betas)
        return schedule

    @property
    def plateau(self) -> Any:
        """The scheduler itself if it is a `ReduceLROnPlateau`; None otherwise."""
        return self if isinstance(self, ReduceLROnPlateau) else None

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved arguments of the scheduler that are plain values."""
        return arguments_of(self, self._scheduler_class)

    def step(self, metrics: Any = None) -> None:
        """Advances the scheduler, unless the optimizer's step was skipped.

        Args:
            metrics: The metric of `ReduceLROnPlateau`, which ignores a step without it (default:
                None).
        """
        if self.plateau is not None:
            if metrics is not None:
                self._add_later_groups()
                self._scheduler_class.step(self, metrics)
        elif self.counter is None or self.counter.has_advanced():
            self._advance()

    def set_length(self, length: RunLength) -> None:
        """Continues at the same step of the schedule for another length."""
        self.length = length
        if uses_total_steps(self._config.factory):
            self.go_to(self.position)

    def set_peaks(self, peaks: Sequence[float]) -> None:
        """Continues at the same step with other peaks, one per group."""
        old, self._peaks = self._peaks, list(peaks)
        keywords = dict(self._config.factory.keywords)
        if "max_lr" in keywords:
            # OneCycleLR and CyclicLR do not use the optimizer's learning rate.
            highest = _per_group(keywords["max_lr"], peaks)
            keywords["max_lr"] = list(peaks)
            if "base_lr" in keywords:
                lowest = _per_group(keywords["base_lr"], peaks)
                scales = [peak / high for peak, high in zip(peaks, highest, strict=True)]
                keywords["base_lr"] = [low * s for low, s in zip(lowest, scales, strict=True)]
            self._factory = functools.partial(self._config.factory.func, **keywords)
        plateau, groups = self.plateau, self.optimizer.param_groups
        if plateau is None:
            self.go_to(self.position)
            return
        self._add_later_groups()
        old += [copy_lr(peak_lr(group)) for group in groups[len(old) :]]
        for index, (group, peak) in enumerate(zip(groups, peaks, strict=True)):
            plateau.min_lrs[index] *= peak / old[index]
            set_lr(group, "lr", group["lr"] * peak / old[index])
            set_lr(group, "initial_lr", peak)

    def go_to(self, step: int) -> None:
        """Continues at a step, with the peaks that the groups have now."""
        if self.counter is not None:
            self.counter.restart()
        if self.plateau is not None:
            return
        groups = self.optimizer.param_groups
        self._peaks += [copy_lr(peak_lr(group)) for group in groups[len(self._peaks) :]]
        for group, peak in zip(groups, self._peaks, strict=True):
            set_lr(group, "lr", peak)
            group.pop("initial_lr", None)
        built = _build_custom(self.optimizer, self._config, self._factory, self.path, self.length)
        own = {name: vars(self)[name] for name in CustomSchedule.__annotations__}
        vars(self).clear()
        vars(self).update({**vars(built), **own, "position": 0})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(step):
                self._advance()

    def resume_at(self, steps: int) -> None:
        """Continues at its own step, or without one at `steps`, after a state was loaded."""
        self._update_peaks()
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        if not self.position or lrs != self.get_last_lr():
            self.go_to(self.position or steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scheduler's state with the number of steps and the settings."""
        inner = self._scheduler_class.state_dict(self)
        own = {key: inner[key] for key in inner if key not in CustomSchedule.__annotations__}
        # A plateau counts comparisons, not steps or epochs.
        interval = self.interval if self.plateau is None else ""
        record: dict[str, Any] = {"position": self.position, "interval": interval}
        if self._factory is not self._config.factory:
            record["peaks"] = list(self._peaks)
        return {**own, **record, "settings": self._saved_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a checkpoint's scheduler; with other settings or peaks, only its step."""
        inner = dict(state_dict)
        saved, own = inner.pop("settings", None), self._saved_settings()
        position = int(inner.pop("position", state_dict.get("last_epoch", 0)))
        has_same_interval = inner.pop("interval", None) == self.interval
        peaks = inner.pop("peaks", None)
        if saved:
            log_changes(self.path, own, saved)
        self._update_peaks()
        self._add_later_groups()
        if self.plateau is not None:
            if "num_bad_epochs" in inner:
                continue_plateau(self.plateau, inner, inner["mode"])
                return
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                set_lr(group, "lr", peak)
            return
        has_same_peaks = all(each == self._peaks for each in _base_lrs(inner))
        has_same_keys = {*inner, "position", "interval", "settings"} == set(self.state_dict())
        is_own = saved is None or (saved == own and has_same_interval and peaks is None)
        if is_own and has_same_keys and has_same_peaks:
            if self.counter is not None:
                self.counter.restart()
            self._scheduler_class.load_state_dict(self, inner)
            self.position = position
            return
        if not has_same_interval:
            # The unit of the saved position differs.
            steps = 0 if self.counter is None else steps_taken(self.optimizer)
            position = self.position or steps or position
        is_kept = saved is not None and saved.get("max_lr") == own.get("max_lr")
        if peaks is not None and is_kept and len(peaks) == len(self.optimizer.param_groups):
            # Found by `lr_find`, for a scheduler that does not use the optimizer's learning rate.
            self.position = position
            self.set_peaks(peaks)
        else:
            self.go_to(position)

    @property
    def _scheduler_class(self) -> Any:
        """The configured class."""
        return type(self).__bases__[1]

    def _saved_settings(self) -> dict[str, Any]:
        """Returns the settings on which the learning rates depend, as plain values."""
        keywords = self._config.factory.keywords
        record = {name: _to_plain(value) for name, value in keywords.items()}
        if uses_total_steps(self._factory):
            record[TOTAL_STEPS] = self.length.total_steps
        return {"name": target_name(self._factory), **record}

    def _update_peaks(self) -> None:
        """Reads the peaks from the groups."""
        groups = self.optimizer.param_groups
        # OneCycleLR and CyclicLR do not use the optimizer's learning rate.
        if not any("max_lr" in group for group in groups):
            self._peaks = [copy_lr(peak_lr(group)) for group in groups]

    def _warn_of_overwritten_settings(self, betas: list[Any]) -> None:
        groups, target = self.optimizer.param_groups, target_name(self._config.factory)
        if betas != [group.get("betas") for group in groups]:
            rank_zero_warn(
                f"{target} cycles the momentum and replaces betas={betas[0]}. To keep them, set"
                f" {(self.path / 'cycle_momentum').override(False)}"
            )
        after = [peak_lr(group) for group in groups]
        if len(set(self._peaks)) > 1 and len(set(after)) == 1:
            rank_zero_warn(
                f"{target} sets the same learning rate for all groups, which discards the scales"
                " of groups and layer_decay. Use a list with one learning rate per group."
            )

    def _advance(self) -> None:
        self.position += 1
        self._add_later_groups()
        self._scheduler_class.step(self)

    def _add_later_groups(self) -> None:
        """Extends the scheduler to groups that were added later."""
        groups, plateau = self.optimizer.param_groups, self.plateau
        if plateau is not None:
            for group in groups[len(plateau.min_lrs) :]:
                plateau.min_lrs.append(plateau.min_lrs[0] * group["lr"] / groups[0]["lr"])
            return
        base_lrs = getattr(self, "base_lrs", None)
        for group in groups[len(base_lrs) :] if base_lrs is not None else ():
            self.base_lrs.append(group.setdefault("initial_lr", copy_lr(group["lr"])))
            lambdas = getattr(self, "lr_lambdas", None)
            if lambdas:
                lambdas.append(lambdas[0])


def arguments_of(scheduler: Any, kind: type[Any]) -> dict[str, Any]:
    """Returns the arguments of a scheduler of class `kind` that are plain values."""
    parameters = inspect.signature(kind).parameters
    resolved = {
        name: value
        for name, value in vars(scheduler).items()
        if name in parameters
        and name != "last_epoch"
        and isinstance(value, bool | int | float | str)
    }
    return {"name": kind.__name__, **resolved}


def _build_custom(
    optimizer: Optimizer,
    config: CustomSchedulerConfig,
    factory: functools.partial[Any],
    path: ConfigPath,
    length: RunLength,
) -> LRScheduler:
    if uses_total_steps(factory) and length.total_steps is None:
        names = [key for key, value in factory.keywords.items() if uses_total_steps(value)]
        raise endless_run_error(path / names[0], TOTAL_STEPS, path / names[0])
    built = _call(factory, path, optimizer, length.total_steps)
    if not isinstance(built, LRScheduler):
        problem = "must be a torch.optim.lr_scheduler.LRScheduler"
        example = "torch.optim.lr_scheduler.OneCycleLR"
        raise (path / "_target_").invalid(target_name(config.factory), problem, example)
    if isinstance(built, ReduceLROnPlateau):
        for group in optimizer.param_groups:
            # Other schedulers store the peak.
            group.setdefault("initial_lr", copy_lr(group["lr"]))
    return built


def _derive(built: LRScheduler, base: type[Any]) -> None:
    """Changes the class of a scheduler to a new subclass of `base` and its own class."""
    kind = type(built)
    built.__class__ = type(kind.__name__, (base, kind), {"__module__": kind.__module__})


def _per_group(value: Any, peaks: Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(peaks)


def continue_plateau(plateau: ReduceLROnPlateau, progress: Mapping[str, Any], mode: Any) -> None:
    """Restores the metrics of a plateau, unless its mode has changed."""
    if mode == plateau.mode:
        for key in PLATEAU_PROGRESS:
            setattr(plateau, key, progress[key])


def _base_lrs(state: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yields the peaks in the states of a scheduler and its children."""
    if "base_lrs" in state:
        yield state["base_lrs"]
    for child in state.get("_schedulers", ()):
        yield from _base_lrs(child)


def _call(
    factory: functools.partial[Any], path: ConfigPath, optimizer: Optimizer, total_steps: int | None
) -> Any:
    """Calls the class of a scheduler, with its children built and `total_steps` filled in."""

    def resolved(value: Any, path: ConfigPath) -> Any:
        if isinstance(value, functools.partial) and isinstance(value.func, type):
            return _call(value, path, optimizer, total_steps)
        if isinstance(value, list | tuple):
            return [resolved(each, path / index) for index, each in enumerate(value)]
        return total_steps if isinstance(value, str) and value == TOTAL_STEPS else value

    keywords = {name: resolved(value, path / name) for name, value in factory.keywords.items()}
    target = functools.partial(factory.func, *factory.args, **keywords)
    if isinstance(target.func, type) and issubclass(target.func, ChainedScheduler):
        # ChainedScheduler takes the optimizer from its children.
        return call_target(target, path)
    built = call_target(target, path, optimizer)
    if isinstance(built, OneCycleLR):
        _derive(built, _ClampedOneCycle)
    return built


def log_changes(path: ConfigPath, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Logs which settings of a schedule differ from the checkpoint's."""
    changed = [
        f"{(path / key).assignment(value)} replaces the checkpoint's"
        f" {(path / key).format(saved[key])}"
        for key, value in own.items()
        if key in saved and saved[key] != value
    ]
    if changed:
        log_info(f"resuming: {'; '.join(changed)}")


def _to_plain(value: Any) -> Any:
    """Converts a value to plain types, which any checkpoint can hold."""
    if isinstance(value, functools.partial):
        return {"name": target_name(value), **{k: _to_plain(v) for k, v in value.keywords.items()}}
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def copy_lr(value: Any) -> Any:
    """Returns a learning rate; a copy of a tensor, because tensors are changed in place."""
    return value.clone() if isinstance(value, Tensor) else value


def set_lr(group: dict[str, Any], key: str, value: Any) -> None:
    """Sets a learning rate; in place for a tensor, which a CUDA graph may have captured."""
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = float(value)
