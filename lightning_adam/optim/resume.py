"""Resuming: with whose settings and schedule a training goes on, and what state belongs to what."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adam._compat.torch import record_lrs
from lightning_adam.config.errors import ConfigError, as_typed
from lightning_adam.config.schema import Interval, Resume
from lightning_adam.optim.optimizers import check_eps, obstacle_to
from lightning_adam.optim.param_groups import LR_RATIO, peak_lr, schedule_share
from lightning_adam.optim.schedulers import cover_later_groups
from lightning_adam.optim.schedulers import settings as scheduler_settings
from lightning_adam.statistics.names import group_name

State = dict[str, Any]
RECORD = "lightning_adam"
"""Where a checkpoint says of which optimizer it is."""
IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Settings that say how a step is computed, and change nothing of what it computes."""
COMMON = ("params", "param_names", "name", "initial_lr", LR_RATIO)
"""What a group has whatever the optimizer is."""
PLATEAU_PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Resumed(NamedTuple):
    """What a training that is resumed was built with from its config."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    interval: str
    """What the scheduler counts: `step` or `epoch`."""
    resume: Resume
    optimizer_place: str
    """The full name of the optimizer's config."""
    scheduler_place: str


def record(checkpoint: State, optimizer: Optimizer) -> None:
    """Writes into a checkpoint of which optimizer it is, which torch does not.

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
    """Edits a checkpoint, so that loading it does what `resume` says.

    The state of each parameter is found by its name, so that groups may have changed; where the
    checkpoint has no names, by its position.

    Args:
        checkpoint: What Lightning has loaded; its `optimizer_states` and `lr_schedulers` are
            replaced.
        built: The optimizer and the scheduler that they will be loaded into.

    Returns:
        The differences between checkpoint and config, each with what was done about it and what to
        type for the opposite.

    Raises:
        ConfigError: If the state is that of another optimizer or of other parameters, or if the
            schedule is of another kind than the one to go on with.
    """
    place, groups = built.optimizer_place, built.optimizer.param_groups
    states = checkpoint["optimizer_states"]
    if len(states) != 1:
        raise ConfigError(
            f"{place}: expected a checkpoint of one optimizer, but it has {len(states)}; resume it"
            " with the module that it was trained with"
        )
    saved = states[0]
    own = _class(built.optimizer)
    kind = checkpoint.get(RECORD, {}).get("optimizer", own)
    if kind != own:
        raise ConfigError(
            f"{place}: expected a checkpoint of {own}, but it is of {kind}; resume it with that, or"
            " start from its weights alone, with load_from_checkpoint instead of ckpt_path"
        )
    if built.scheduler is not None:
        cover_later_groups(built.scheduler)
    origins = _origins(saved, groups, place)
    sources = [_source(saved["param_groups"], origin) for origin in origins]
    lines = list(_moved(saved, groups, origins, sources, place))
    if built.resume is Resume.config:
        schedulers = _advanced(checkpoint, built)
        lines += _differences(saved["param_groups"], sources, groups, built)
        loaded = [_settings(group) for group in groups]
    else:
        lines += _differences(saved["param_groups"], sources, groups, built)
        loaded = list(_kept(saved["param_groups"], sources, groups))
        lines += _keep_implementation(loaded, groups, place)
        schedulers, schedule_lines = _kept_schedule(checkpoint, built, sources, loaded)
        lines += schedule_lines
    state, position = {}, 0
    for group, settings, origin in zip(groups, loaded, origins, strict=True):
        known = next(filter(None, origin), None)
        if known is not None:
            settings |= _progress(built.optimizer, group, saved["param_groups"][known.group])
        if "eps" in settings:
            check_eps(group, settings["eps"], place)
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
    """Where a parameter stood in the checkpoint."""

    position: int
    group: int
    name: str


def _origins(
    saved: State, groups: Sequence[Mapping[str, Any]], place: str
) -> list[list[_Origin | None]]:
    """For each parameter of each group, where the checkpoint has it."""
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
            raise ConfigError(
                f"{place}: expected a checkpoint of this module, but it has the state of"
                f" {', '.join(list(by_name)[:3])}, …; none of these is trained here"
            )
        return origins
    sizes, saved_sizes = (
        [len(group["params"]) for group in each] for each in (groups, saved["param_groups"])
    )
    if sizes != saved_sizes:
        raise ConfigError(
            f"{place}: expected the groups of the checkpoint, which has no names of parameters to"
            f" sort them by, with {saved_sizes} parameters each, but got {sizes}; type the groups"
            " that it was trained with"
        )
    remaining = iter(known)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _source(saved_groups: Sequence[State], origins: Sequence[_Origin | None]) -> int | None:
    """The saved group whose settings are those of all of a group's parameters, if there is one."""
    numbers = sorted({origin.group for origin in origins if origin})
    settings = [_compared(saved_groups[number]) for number in numbers]
    return numbers[0] if numbers and all(each == settings[0] for each in settings) else None


def _moved(
    saved: State,
    groups: Sequence[Mapping[str, Any]],
    origins: Sequence[Sequence[_Origin | None]],
    sources: Sequence[int | None],
    place: str,
) -> Iterator[str]:
    """What the checkpoint does not have, what is not needed of it, and what it has as several."""
    found = {origin.position for row in origins for origin in row if origin}
    fresh = [
        name
        for group, row in zip(groups, origins, strict=True)
        for name, origin in zip(group.get("param_names", row), row, strict=True)
        if origin is None
    ]
    if fresh:
        yield f"{place}: the checkpoint has no state of {_some(fresh)}; their moments start at 0"
    frozen = [
        origin.name
        for group, row in zip(groups, origins, strict=True)
        for parameter, origin in zip(group["params"], row, strict=True)
        if origin and not parameter.requires_grad
    ]
    if frozen:
        yield (
            f"{place}: the checkpoint trained {_some(frozen)}, which are frozen now; they are not"
            " trained until something unfreezes them"
        )
    left = [
        name
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False)
        if index not in found
    ]
    if left:
        yield f"{place}: the checkpoint's state of {_some(left)} is left out, for it is not trained"
    for index, (group, row, source) in enumerate(zip(groups, origins, sources, strict=True)):
        if source is None and any(row):
            yield (
                f"{place}: the checkpoint trained what is in the group {group_name(group, index)}"
                " with several settings; those of the config are taken"
            )


def _settings(group: Mapping[str, Any]) -> State:
    return {key: value for key, value in group.items() if key != "params"}


def _progress(optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any]) -> State:
    """How far a saved group has come, where a library counts that in its groups.

    What the class's constructor does not take is no setting, and what the config leaves open, the
    first step has settled.
    """
    if isinstance(optimizer, Adam):
        return {}
    constructors = [vars(kind).get("__init__") for kind in type(optimizer).__mro__]
    arguments = {
        name for each in constructors if each for name in inspect.signature(each).parameters
    }
    # One that takes them all as keywords does not say what its settings are.
    counts = optimizer.defaults.keys() - arguments if "lr" in arguments else set()
    return {
        key: value
        for key, value in saved.items()
        if key not in (*COMMON, *IMPLEMENTATION) and (key in counts or group.get(key) is None)
    }


def _compared(group: Mapping[str, Any]) -> State:
    """What two groups' steps differ by; the learning rate is the peak of the schedule."""
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
    """Each setting that the checkpoint and the config do not have in common, once."""
    different: dict[tuple[str, str, str], list[str]] = {}
    for index, (group, source) in enumerate(zip(groups, sources, strict=True)):
        if source is not None:
            now, then = _compared(group), _compared(saved_groups[source])
            progress = _progress(built.optimizer, group, saved_groups[source])
            for key in now.keys() & then.keys() & built.optimizer.defaults.keys():
                if now[key] != then[key] and key not in progress:
                    entry = (key, as_typed(now[key]), as_typed(then[key]))
                    different.setdefault(entry, []).append(group_name(group, index))
    for (key, asked, saved), names in sorted(different.items()):
        where = "" if len(names) == len(groups) else f" (in {', '.join(names)})"
        yield _said(built, built.optimizer_place, key, asked, saved, where)


def _said(built: Resumed, place: str, key: str, asked: str, saved: str, where: str = "") -> str:
    if built.resume is Resume.config:
        return f"{place}.{key}={asked}{where}: from here on, after the checkpoint's {saved}"
    return (
        f"{place}.{key}={asked}{where}: the checkpoint's {saved} is kept; type"
        f" {built.optimizer_place}.resume=config to train on with {asked}"
    )


def _kept(
    saved_groups: Sequence[State],
    sources: Sequence[int | None],
    groups: Sequence[Mapping[str, Any]],
) -> Iterator[State]:
    """The groups with the checkpoint's settings; the names are those of today's groups."""
    for group, source in zip(groups, sources, strict=True):
        own = _settings(group)
        if source is not None:
            today: State = {
                key: own[key] for key in ("name", "param_names", LR_RATIO) if key in own
            }
            yield {**own, **_settings(saved_groups[source]), **today}
        else:
            yield {**own, "lr": peak_lr(own) * schedule_share(saved_groups[0])}


def _keep_implementation(
    loaded: Sequence[State], groups: Sequence[Mapping[str, Any]], place: str
) -> Iterator[str]:
    """Takes the checkpoint's implementation if it works here, else the config's."""
    asked, saved = _implementation(groups[0]), _implementation(loaded[0])
    if "fused" not in groups[0] or asked == saved:
        return
    flags = {key: bool(loaded[0].get(key)) for key in ("fused", "foreach")}
    parameters = [each for group in groups for each in group["params"]]
    obstacle = obstacle_to(parameters, bool(loaded[0].get("capturable")), **flags)
    if obstacle is None:
        yield (
            f"{place}: the checkpoint's {saved} is kept, not {asked}; type {place}.resume=config to"
            f" train on with {asked}"
        )
        return
    for settings, group in zip(loaded, groups, strict=True):
        settings.update({key: group[key] for key in IMPLEMENTATION})
    yield f"{place}: {asked}, for the checkpoint's {saved} cannot work here: {obstacle}"


def _implementation(group: Mapping[str, Any]) -> str:
    name = next((key for key in ("fused", "foreach") if group.get(key)), "for-loop")
    return f"{name}, capturable" if group.get("capturable") else name


def _fitting(entry: State, parameter: Tensor, settings: State, built: Resumed, name: str) -> State:
    """A parameter's state, with a maximum of the second moment if amsgrad asks for one."""
    place = built.optimizer_place
    if entry and isinstance(built.optimizer, Adam) and not {"exp_avg", "exp_avg_sq"} <= {*entry}:
        raise ConfigError(
            f"{place}: expected a checkpoint of Adam, but the state of {name} is"
            f" {', '.join(map(str, entry))}; resume it with the optimizer that it was trained with,"
            " or start from its weights alone, with load_from_checkpoint instead of ckpt_path"
        )
    moment = entry.get("exp_avg")
    if isinstance(moment, Tensor) and moment.shape != parameter.shape:
        raise ConfigError(
            f"{place}: expected a state of the shape of {name}, {tuple(parameter.shape)}, but the"
            f" checkpoint's is {tuple(moment.shape)}; resume it with the module that it was trained"
            " with"
        )
    if not isinstance(built.optimizer, Adam) or not entry:
        return entry
    kept = {key: value for key, value in entry.items() if key != "max_exp_avg_sq"}
    if settings.get("amsgrad"):
        # A maximum that was not followed so far starts from where the moment stands.
        kept["max_exp_avg_sq"] = entry.get("max_exp_avg_sq", entry["exp_avg_sq"].clone())
    return kept


def _kept_schedule(
    checkpoint: State, built: Resumed, sources: Sequence[int | None], loaded: Sequence[State]
) -> tuple[list[State], list[str]]:
    """The checkpoint's schedule, for today's groups."""
    schedulers, scheduler = checkpoint["lr_schedulers"], built.scheduler
    if not schedulers and scheduler is None:
        return [], []
    instead = f"type {built.optimizer_place}.resume=config to train on with the config's"
    if scheduler is None:
        raise ConfigError(
            f"{built.scheduler_place}: expected the schedule of the checkpoint, but the config has"
            f" none; type the one that it was trained with, or {instead}"
        )
    if not schedulers or _kind(schedulers[0]) != _kind(scheduler.state_dict()):
        has = "has none" if not schedulers else "has one of another kind"
        raise ConfigError(
            f"{built.scheduler_place}={scheduler_settings(scheduler)['name']}: expected the"
            f" schedule of the checkpoint, but it {has}; {instead}"
        )
    state = dict(schedulers[0])
    asked = scheduler_settings(scheduler)
    saved = _schedule_settings(state)
    lines = [
        _said(built, built.scheduler_place, key, as_typed(asked[key]), as_typed(saved[key]))
        for key in asked
        if key in saved and asked[key] != saved[key]
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
    """What tells one class of schedulers from another, and our shapes from others' functions."""
    functions = state.get("lr_lambdas") or [None]
    return set(state), set(functions[0] or ())


def _schedule_settings(state: Mapping[str, Any]) -> State:
    """A saved schedule's settings, ours as `schedulers.settings` gives them."""
    functions = state.get("lr_lambdas") or [None]
    if functions[0] is None:
        return dict(state)
    return {**functions[0], **functions[0].get("arguments", {})}


def _advanced(checkpoint: State, built: Resumed) -> list[State]:
    """The config's schedule, at the point where the checkpoint stands."""
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
    elif built.interval == Interval.step:
        entries = checkpoint["optimizer_states"][0]["state"].values()
        steps = int(max((float(entry.get("step", 0)) for entry in entries), default=0))
    else:
        raise ConfigError(
            f"{built.scheduler_place}={scheduler_settings(scheduler)['name']}: expected a schedule"
            " that counts steps, or the checkpoint's own, for it is not known how many epochs this"
            f" one has to go on from; type {built.scheduler_place}.interval=step"
        )
    _go_to(scheduler, steps)
    return [scheduler.state_dict()]


def _go_to(scheduler: LRScheduler, steps: int) -> None:
    """Takes a fresh scheduler to a step; most know their value there from the steps before."""
    if isinstance(scheduler, LambdaLR) and steps > 0:
        scheduler.last_epoch, steps = steps - 1, 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()


def _continue_plateau(
    optimizer_state: State, saved: Mapping[str, Any], scheduler: ReduceLROnPlateau
) -> None:
    """Goes on with what a plateau has seen, and with the share of the peak that it has come to."""
    if saved["mode"] == scheduler.mode:
        for key in PLATEAU_PROGRESS:
            setattr(scheduler, key, saved[key])
    share = schedule_share(optimizer_state["param_groups"][0])
    for group in scheduler.optimizer.param_groups:
        group["lr"] *= share
    record_lrs(scheduler)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
