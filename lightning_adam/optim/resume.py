"""Resume from a checkpoint: which settings and schedule apply, and which state is whose."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adam._compat.torch import record_lrs
from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.optimizer import Resume
from lightning_adam.config.schedule import SchedulerInterval
from lightning_adam.optim.optimizers import check_eps, unsupported_reason
from lightning_adam.optim.param_groups import LR_SCALE, lr_factor, peak_lr
from lightning_adam.optim.schedulers import schedule_later_groups, scheduler_settings
from lightning_adam.statistics.names import group_name

State = dict[str, Any]
RECORD = "lightning_adam"
"""Key of the record that names the optimizer of a checkpoint."""
IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Settings that change how a step is computed, not its result."""
FROM_WEIGHTS = "start from its weights alone, with load_from_checkpoint instead of ckpt_path"
COMMON = ("params", "param_names", "name", "initial_lr", LR_SCALE)
"""Keys of a group that do not depend on the optimizer's class."""
PLATEAU_PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Resumed(NamedTuple):
    """The optimizer and the scheduler of a resumed run, as its config builds them."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    interval: str
    """Unit of the scheduler's steps: `step` or `epoch`."""
    resume: Resume
    optimizer_path: ConfigPath
    scheduler_path: ConfigPath


def record(checkpoint: State, optimizer: Optimizer) -> None:
    """Records the class of the optimizer in a checkpoint; torch does not.

    Example:
        >>> checkpoint = {}
        >>> record(checkpoint, Adam([Tensor([0.0])]))
        >>> checkpoint
        {'lightning_adam': {'optimizer': 'torch.optim.adam.Adam'}}
    """
    checkpoint[RECORD] = {"optimizer": _class(optimizer)}


def _class(optimizer: Optimizer) -> str:
    # torch's AdamW is its Adam with another default.
    kind = Adam if type(optimizer).step is AdamW.step else type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def reconcile(checkpoint: State, built: Resumed) -> list[str]:
    """Edits a checkpoint, so that loading it has the effect of the `resume` setting.

    The state of a parameter is found by the parameter's name, so that groups may differ. In a
    checkpoint without names it is found by position.

    Args:
        checkpoint: The checkpoint that Lightning has loaded; its `optimizer_states` and
            `lr_schedulers` are replaced.
        built: The optimizer and the scheduler that will load it.

    Returns:
        The differences between checkpoint and config, which one applies, and how to change that.

    Raises:
        ConfigError: If the state belongs to another optimizer or to other parameters, or if the
            schedule is of another kind.
    """
    path, groups = built.optimizer_path, built.optimizer.param_groups
    states = checkpoint["optimizer_states"]
    if len(states) != 1:
        raise path.error(
            f"cannot resume from a checkpoint of {len(states)} optimizers",
            "Resume it with the module that it was trained with",
        )
    saved = states[0]
    own = _class(built.optimizer)
    kind = checkpoint.get(RECORD, {}).get("optimizer", own)
    if kind != own:
        raise path.error(
            f"is {own}, but the checkpoint was trained with {kind}",
            f"Resume it with {kind}, or {FROM_WEIGHTS}",
        )
    if built.scheduler is not None:
        schedule_later_groups(built.scheduler)
    origins = _origins(saved, groups, path)
    sources = [_source(saved["param_groups"], origin) for origin in origins]
    lines = list(_moved(saved, groups, origins, sources, path))
    if built.resume is Resume.config:
        schedulers = _advanced(checkpoint, built)
        lines += _differences(saved["param_groups"], sources, groups, built)
        loaded = [_settings(group) for group in groups]
    else:
        lines += _differences(saved["param_groups"], sources, groups, built)
        loaded = list(_kept(saved["param_groups"], sources, groups))
        lines += _keep_implementation(loaded, groups, built)
        schedulers, schedule_lines = _kept_schedule(checkpoint, built, sources, loaded)
        lines += schedule_lines
    state, position = {}, 0
    for group, settings, origin in zip(groups, loaded, origins, strict=True):
        known = next(filter(None, origin), None)
        if known is not None:
            settings |= _progress(built.optimizer, group, saved["param_groups"][known.group])
        if "eps" in settings:
            check_eps(group, settings["eps"], path)
        settings["params"] = list(range(position, position + len(origin)))
        for parameter, found in zip(group["params"], origin, strict=True):
            if found is not None:
                entry = saved["state"].get(found.position, {})
                state[position] = _fitting(entry, parameter, settings, built, found.name)
            position += 1
    checkpoint["optimizer_states"] = [{**saved, "state": state, "param_groups": loaded}]
    checkpoint["lr_schedulers"] = schedulers
    return lines


class _Origin(NamedTuple):
    """The place of a parameter in the checkpoint."""

    position: int
    group: int
    name: str


def _origins(
    saved: State, groups: Sequence[Mapping[str, Any]], path: ConfigPath
) -> list[list[_Origin | None]]:
    """For each parameter of each group, its place in the checkpoint."""
    known = [
        _Origin(index, number, name)
        for number, group in enumerate(saved["param_groups"])
        for index, name in zip(
            group["params"],
            group.get("param_names", [f"parameter {each}" for each in group["params"]]),
            strict=True,
        )
    ]
    if all("param_names" in group for group in (*saved["param_groups"], *groups)):
        by_name = {each.name: each for each in known}
        origins = [[by_name.get(name) for name in group["param_names"]] for group in groups]
        if not any(origin for row in origins for origin in row):
            raise path.error(
                "trains none of the parameters in the checkpoint, which are"
                f" {', '.join(list(by_name)[:3])}, …",
                "Resume it with the module that it was trained with",
            )
        return origins
    sizes, saved_sizes = (
        [len(group["params"]) for group in each] for each in (groups, saved["param_groups"])
    )
    if sizes != saved_sizes:
        raise path.error(
            f"has groups of {sizes} parameters, but the checkpoint, which has no parameter names,"
            f" has groups of {saved_sizes}",
            "Configure the groups that it was trained with",
        )
    remaining = iter(known)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _source(saved_groups: Sequence[State], origins: Sequence[_Origin | None]) -> int | None:
    """The saved group with the settings of all parameters of a group; None if they differ."""
    numbers = sorted({origin.group for origin in origins if origin})
    settings = [_compared(saved_groups[number]) for number in numbers]
    return numbers[0] if numbers and all(each == settings[0] for each in settings) else None


def _moved(
    saved: State,
    groups: Sequence[Mapping[str, Any]],
    origins: Sequence[Sequence[_Origin | None]],
    sources: Sequence[int | None],
    path: ConfigPath,
) -> Iterator[str]:
    """Parameters that are new, frozen or removed, and groups whose saved settings differ."""
    found = {origin.position for row in origins for origin in row if origin}
    fresh = [
        name
        for group, row in zip(groups, origins, strict=True)
        for name, origin in zip(group.get("param_names", row), row, strict=True)
        if origin is None
    ]
    if fresh:
        yield f"{path.name}: no saved state of {_some(fresh)}; their moments start at 0"
    frozen = [
        origin.name
        for group, row in zip(groups, origins, strict=True)
        for parameter, origin in zip(group["params"], row, strict=True)
        if origin and not parameter.requires_grad
    ]
    if frozen:
        yield (
            f"{path.name}: {_some(frozen)} were trained in the checkpoint and are now frozen. They"
            " are not trained until they are unfrozen"
        )
    left = [
        name
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False)
        if index not in found
    ]
    if left:
        yield f"{path.name}: the checkpoint's state of {_some(left)} is discarded: not trained here"
    for index, (group, row, source) in enumerate(zip(groups, origins, sources, strict=True)):
        if source is None and any(row):
            yield (
                f"{path.name}: the checkpoint has several settings for the parameters of the group"
                f" {group_name(group, index)}, so the config's apply"
            )


def _settings(group: Mapping[str, Any]) -> State:
    return {key: value for key, value in group.items() if key != "params"}


def _progress(optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any]) -> State:
    """The progress in a saved group, for libraries that store it there.

    That is what the constructor does not take, and what the first step sets if the config does not.
    """
    if isinstance(optimizer, Adam):
        return {}
    constructors = [vars(kind).get("__init__") for kind in type(optimizer).__mro__]
    arguments = {
        name for each in constructors if each for name in inspect.signature(each).parameters
    }
    # The settings of a constructor with **kwargs are not known.
    counts = optimizer.defaults.keys() - arguments if "lr" in arguments else set()
    return {
        key: value
        for key, value in saved.items()
        if key not in (*COMMON, *IMPLEMENTATION) and (key in counts or group.get(key) is None)
    }


def _compared(group: Mapping[str, Any]) -> State:
    """The settings that change a step's result; lr is the peak of the schedule."""
    settings = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in group.items()
        if key not in (*COMMON, *IMPLEMENTATION)
    }
    settings["lr"] = float(peak_lr(group))
    return settings


def _differences(
    saved_groups: Sequence[State],
    sources: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
    built: Resumed,
) -> Iterator[str]:
    """Each setting that differs between the checkpoint and the config, once."""
    different: dict[tuple[str, str, str], list[str]] = {}
    for index, (group, source) in enumerate(zip(groups, sources, strict=True)):
        if source is not None:
            now, then = _compared(group), _compared(saved_groups[source])
            progress = _progress(built.optimizer, group, saved_groups[source])
            for key in now.keys() & then.keys() & built.optimizer.defaults.keys():
                if now[key] != then[key] and key not in progress:
                    path = built.optimizer_path / key
                    entry = (key, path.format(now[key]), path.format(then[key]))
                    different.setdefault(entry, []).append(group_name(group, index))
    for (key, asked, saved), names in sorted(different.items()):
        where = "" if len(names) == len(groups) else f" (in {', '.join(names)})"
        yield _difference(built, built.optimizer_path / key, asked, saved, where)


def _difference(
    built: Resumed, path: ConfigPath, configured: str, saved: str, where: str = ""
) -> str:
    setting = f"{path.name}={configured}{where}"
    if built.resume is Resume.config:
        return f"{setting} replaces the checkpoint's {saved}"
    return f"{setting} is not used: the checkpoint's {saved} is kept. {_use_config(built)}"


def _use_config(built: Resumed) -> str:
    """The suggestion to use the config's settings."""
    return f"To use the config's, set {(built.optimizer_path / 'resume').override('config')}"


def _kept(
    saved_groups: Sequence[State],
    sources: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
) -> Iterator[State]:
    """The groups with the checkpoint's settings, under their current names."""
    for group, source in zip(groups, sources, strict=True):
        own = _settings(group)
        if source is not None:
            names: State = {
                key: own[key] for key in ("name", "param_names", LR_SCALE) if key in own
            }
            yield {**own, **_settings(saved_groups[source]), **names}
        else:
            yield {**own, "lr": peak_lr(own) * lr_factor(saved_groups[0])}


def _keep_implementation(
    loaded: Sequence[State], groups: Sequence[Mapping[str, Any]], built: Resumed
) -> Iterator[str]:
    """Keeps the checkpoint's implementation if it is supported here, otherwise the config's."""
    configured, saved = _implementation(groups[0]), _implementation(loaded[0])
    if "fused" not in groups[0] or configured == saved:
        return
    flags = {key: bool(loaded[0].get(key)) for key in ("fused", "foreach")}
    parameters = [each for group in groups for each in group["params"]]
    unsupported = unsupported_reason(parameters, bool(loaded[0].get("capturable")), **flags)
    name = built.optimizer_path.name
    if unsupported is None:
        yield f"{name}: the checkpoint's {saved} is kept, not {configured}. {_use_config(built)}"
        return
    for settings, group in zip(loaded, groups, strict=True):
        settings.update({key: group[key] for key in IMPLEMENTATION})
    yield f"{name}: {configured}, because {saved} is not supported here: {unsupported}"


def _implementation(group: Mapping[str, Any]) -> str:
    name = next((key for key in ("fused", "foreach") if group.get(key)), "for-loop")
    return f"{name}, capturable" if group.get("capturable") else name


def _fitting(entry: State, parameter: Tensor, settings: State, built: Resumed, name: str) -> State:
    """A parameter's state, with max_exp_avg_sq if and only if amsgrad is set."""
    path = built.optimizer_path
    if entry and isinstance(built.optimizer, Adam) and not {"exp_avg", "exp_avg_sq"} <= {*entry}:
        raise path.error(
            f"is Adam, but the checkpoint's state of {name} has {', '.join(map(str, entry))}",
            f"Resume it with the optimizer that it was trained with, or {FROM_WEIGHTS}",
        )
    moment = entry.get("exp_avg")
    if isinstance(moment, Tensor) and moment.shape != parameter.shape:
        raise path.error(
            f"trains {name} with the shape {tuple(parameter.shape)}, but the checkpoint's has"
            f" {tuple(moment.shape)}",
            "Resume it with the module that it was trained with",
        )
    if not isinstance(built.optimizer, Adam) or not entry:
        return entry
    kept = {key: value for key, value in entry.items() if key != "max_exp_avg_sq"}
    if settings.get("amsgrad"):
        # A new maximum starts at the current second moment.
        kept["max_exp_avg_sq"] = entry.get("max_exp_avg_sq", entry["exp_avg_sq"].clone())
    return kept


def _kept_schedule(
    checkpoint: State, built: Resumed, sources: Sequence[int | None], loaded: Sequence[State]
) -> tuple[list[State], list[str]]:
    """The checkpoint's schedule for the current groups."""
    schedulers, scheduler = checkpoint["lr_schedulers"], built.scheduler
    if not schedulers and scheduler is None:
        return [], []
    if scheduler is None:
        raise built.scheduler_path.error(
            "is not set, but the checkpoint has a schedule",
            f"Configure the schedule that it was trained with. {_use_config(built)}",
        )
    if not schedulers or _kind(schedulers[0]) != _kind(scheduler.state_dict()):
        raise built.scheduler_path.error(
            "differs from the checkpoint, which has"
            f" {'another schedule' if schedulers else 'no schedule'}",
            _use_config(built),
            value=scheduler_settings(scheduler)["name"],
        )
    state = dict(schedulers[0])
    configured = scheduler_settings(scheduler)
    saved = _schedule_settings(state)
    lines = [
        _difference(built, path, path.format(value), path.format(saved[key]))
        for key, value in configured.items()
        for path in [built.scheduler_path / key]
        if key in saved and value != saved[key]
    ]
    saved_groups = len(checkpoint["optimizer_states"][0]["param_groups"])
    if list(sources) != list(range(saved_groups)):
        for key, value in state.items():
            if isinstance(value, list) and len(value) == saved_groups:
                state[key] = [value[source or 0] for source in sources]
    if "base_lrs" in state:
        state["base_lrs"] = [group["initial_lr"] for group in loaded]
    state["_last_lr"] = [group["lr"] for group in loaded]
    return [state], lines


def _kind(state: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """What distinguishes a scheduler's class, and our schedules from other functions."""
    functions = state.get("lr_lambdas") or [None]
    return set(state), set(functions[0] or ())


def _schedule_settings(state: Mapping[str, Any]) -> State:
    """The settings in a scheduler's state, ours as `scheduler_settings` returns them."""
    functions = state.get("lr_lambdas") or [None]
    if functions[0] is None:
        return dict(state)
    return {**functions[0], **functions[0].get("arguments", {})}


def _advanced(checkpoint: State, built: Resumed) -> list[State]:
    """The config's schedule at the step of the checkpoint."""
    schedulers, scheduler = checkpoint["lr_schedulers"], built.scheduler
    if scheduler is None:
        return []
    saved = schedulers[0] if schedulers else {}
    is_same_kind = bool(saved) and _kind(saved) == _kind(scheduler.state_dict())
    if isinstance(scheduler, ReduceLROnPlateau):
        if is_same_kind:
            _continue_plateau(checkpoint["optimizer_states"][0], saved, scheduler)
        return [scheduler.state_dict()]
    if is_same_kind:
        steps = int(saved["last_epoch"])
    elif built.interval == SchedulerInterval.step:
        entries = checkpoint["optimizer_states"][0]["state"].values()
        steps = int(max((float(entry.get("step", 0)) for entry in entries), default=0))
    else:
        raise built.scheduler_path.error(
            "counts epochs, and the checkpoint's schedule does not tell how many are done",
            f"Set {(built.scheduler_path / 'interval').override('step')}",
            value=scheduler_settings(scheduler)["name"],
        )
    _go_to(scheduler, steps)
    return [scheduler.state_dict()]


def _go_to(scheduler: LRScheduler, steps: int) -> None:
    """Advances a new scheduler to a step; most compute their value from the previous one."""
    if isinstance(scheduler, LambdaLR) and steps > 0:
        scheduler.last_epoch, steps = steps - 1, 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def _continue_plateau(
    optimizer_state: State, saved: Mapping[str, Any], scheduler: ReduceLROnPlateau
) -> None:
    """Restores the progress of a plateau, and its current fraction of the peak."""
    if saved["mode"] == scheduler.mode:
        for key in PLATEAU_PROGRESS:
            setattr(scheduler, key, saved[key])
    share = lr_factor(optimizer_state["param_groups"][0])
    for group in scheduler.optimizer.param_groups:
        group["lr"] *= share
    record_lrs(scheduler)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
