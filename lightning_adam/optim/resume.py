"""Merges a checkpoint's optimizer state with the config: settings, and states by parameter name.

Each parameter group stores the settings that its config had. A setting that differs between the
stored and the current config was changed by the user, and applies. All others are the checkpoint's.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.optimizer import Resume
from lightning_adam.optim.console import log_info
from lightning_adam.optim.optimizers import check_eps
from lightning_adam.optim.param_groups import LR_SCALE, lr_factor, peak_lr
from lightning_adam.statistics.names import clean_name, group_name
from lightning_adam.statistics.sharding import unwrap_optimizer

State = dict[str, Any]
CONFIGURED = "configured"
"""Key of a group's configured settings and the optimizer's class, as pairs.

torch.distributed.checkpoint would load a dict in place.
"""
IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Settings that change how a step is computed, not its result: always from the current run."""
CURRENT_KEYS = ("params", "param_names", "name", LR_SCALE, CONFIGURED, *IMPLEMENTATION)
"""Keys of a group that are always from the current run."""
FROM_WEIGHTS = "start from its weights alone, with load_from_checkpoint instead of ckpt_path"


def attach(optimizer: Optimizer, names: Sequence[str], resume: Resume, path: ConfigPath) -> None:
    """Makes `optimizer.load_state_dict` merge a checkpoint with the config.

    It finds the state of a parameter by name, so the groups may differ. In a checkpoint without
    names it finds the state by position.

    Args:
        optimizer: The optimizer, as built from its config.
        names: The names of all parameters of the module, in its order.
        resume: Which settings apply where they differ.
        path: The path of the config.

    Example:
        >>> import torch
        >>> def build(lr):
        ...     adam = Adam([torch.zeros(1, requires_grad=True)], lr=lr)
        ...     attach(adam, ["weight"], Resume.checkpoint, ConfigPath("optimizer"))
        ...     return adam
        >>> saved = build(0.1)
        >>> saved.param_groups[0]["eps"] = 1e-6
        >>> resumed = build(0.2)
        >>> resumed.load_state_dict(saved.state_dict())
        >>> [resumed.param_groups[0][key] for key in ("lr", "eps")]
        [0.2, 1e-06]
    """

    def record(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group.setdefault(CONFIGURED, _configured_settings(optimizer, group))

    def merge(optimizer: Optimizer, saved: State) -> State:
        record(optimizer)
        lines, merged = _merge(saved, optimizer, names, resume, path)
        for line in lines:
            log_info(f"resuming: {line}")
        if unwrap_optimizer(optimizer) is not optimizer:
            _update_zero_groups(saved, merged, path)
        return merged

    record(optimizer)
    # Groups that are added later have no record yet.
    optimizer.register_state_dict_pre_hook(record)
    optimizer.register_load_state_dict_pre_hook(merge)


def _update_zero_groups(saved: State, merged: State, path: ConfigPath) -> None:
    """Puts the merged groups into `saved`, from which ZeroRedundancyOptimizer reads them."""
    then, now = saved["param_groups"], merged["param_groups"]
    if [_saved_names(group) for group in then] != [_saved_names(group) for group in now]:
        raise path.error(
            "has other groups than the checkpoint, and ZeroRedundancyOptimizer finds states by"
            " their position",
            "Configure the groups of the checkpoint",
        )
    then[:] = now


def load_saved_groups(
    optimizer: Optimizer, folder: Callable[[], Path], name: str
) -> RemovableHandle:
    """Makes an optimizer load a sharded checkpoint that may have other groups.

    torch.distributed.checkpoint loads into the entries of the optimizer's `state_dict`, so a hook
    gives the `state_dict` the groups of the checkpoint.

    Args:
        optimizer: The optimizer.
        folder: Returns the checkpoint's folder; called when the checkpoint is loaded.
        name: The optimizer's key in the checkpoint.

    Returns:
        The handle of the hook.
    """

    def use_saved_groups(_: Optimizer, state: State) -> State:
        if not (folder() / ".metadata").is_file():
            return state
        saved = _saved_groups(folder(), name)
        if [{*each} for each in state["param_groups"]] == [{*each} for each in saved]:
            return state
        return {**state, "param_groups": saved}

    return optimizer.register_state_dict_post_hook(use_saved_groups)


def _saved_groups(folder: Path, name: str) -> list[State]:
    """Returns the groups of a sharded checkpoint, without their values."""
    # Some builds of torch do not have it, and its import is slow.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = FileSystemReader(folder).read_metadata()
    groups: dict[int, State] = {}
    for key, key_path in (metadata.planner_data or {}).items():
        is_setting = isinstance(metadata.state_dict_metadata.get(key), BytesStorageMetadata)
        if tuple(key_path[:2]) == (name, "param_groups") and len(key_path) == 4 and is_setting:
            groups.setdefault(key_path[2], {"params": []}).setdefault(key_path[3])
    return [groups[number] for number in sorted(groups)]


def optimizer_class(groups: Sequence[Mapping[str, Any]]) -> str:
    """Returns the class of the optimizer that saved groups; empty if it is not recorded.

    Example:
        >>> optimizer_class([{"lr": 0.1}])
        ''
    """
    return next((str(dict(each[CONFIGURED])["class"]) for each in groups if CONFIGURED in each), "")


def _configured_settings(
    optimizer: Optimizer, group: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    return tuple({"class": _class(optimizer), **_comparable(optimizer, group)}.items())


def _class(optimizer: Optimizer) -> str:
    # In torch, AdamW is Adam with another default.
    kind = Adam if type(optimizer).step is AdamW.step else type(optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _comparable(optimizer: Optimizer, group: Mapping[str, Any]) -> State:
    """Returns the settings that change a step's result. `lr` is the peak of the schedule."""
    settings = {
        key: _to_plain(value)
        for key, value in group.items()
        if key in optimizer.defaults and key not in IMPLEMENTATION
    }
    if "lr" in group:
        settings["lr"] = _to_plain(peak_lr(group))
    return settings


def _to_plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_to_plain, value))
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else getattr(value, "__qualname__", type(value).__qualname__)


def _merge(
    saved: State, optimizer: Optimizer, names: Sequence[str], resume: Resume, path: ConfigPath
) -> tuple[list[str], State]:
    """Returns the lines to log about the differences, and the state to load."""
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    current_class = _class(optimizer)
    saved_class = optimizer_class(saved_groups) or current_class
    if saved_class != current_class:
        raise path.error(
            f"is {current_class}, but the checkpoint was trained with {saved_class}",
            f"Resume it with {saved_class}, or {FROM_WEIGHTS}",
        )
    origins = _origins(saved, groups, names, path)
    lines = list(_describe_moves(saved, groups, origins, path))
    differences = _Differences(path, len(groups))
    merged, state, position = [], {}, 0
    for index, (group, origin) in enumerate(zip(groups, origins, strict=True)):
        numbers = sorted({each.group for each in origin if each})
        candidates = [
            _merge_group(optimizer, group, saved_groups[number], resume) for number in numbers
        ]
        settings = candidates[0] if candidates else _config_settings(group, saved_groups)
        expected = _comparable(optimizer, settings)
        if any(_comparable(optimizer, each) != expected for each in candidates):
            settings = _config_settings(group, saved_groups)
            lines.append(
                f"{path.name}: the checkpoint has several settings for the parameters of the group"
                f" {group_name(group, index)}, so the config's apply"
            )
        elif candidates:
            differences.add(optimizer, group, saved_groups[numbers[0]], settings, index)
        if "eps" in settings:
            check_eps(group, settings["eps"], path)
        settings["params"] = list(range(position, position + len(origin)))
        for parameter, found in zip(group["params"], origin, strict=True):
            if found is not None:
                entry = saved["state"].get(found.key) or {}
                state[position] = _fit_state(
                    entry, parameter, settings, optimizer, found.name, path
                )
            position += 1
        merged.append(settings)
    return lines + differences.lines(), {**saved, "state": state, "param_groups": merged}


def _merge_group(
    optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any], resume: Resume
) -> State:
    """Returns a saved group, with the settings from the config that the user has changed."""
    then, now = dict(saved.get(CONFIGURED, ())), dict(group[CONFIGURED])
    changed = {
        key
        for key in now
        if resume is Resume.config or (key in then and _to_plain(then[key]) != now[key])
    }
    settings = {
        **group,
        **{
            # torch.distributed.checkpoint makes lists of tuples.
            key: tuple(value) if isinstance(group.get(key), tuple) else value
            for key, value in saved.items()
            if key not in CURRENT_KEYS
        },
    }
    progress = _progress(optimizer, group, saved)
    from_config = changed - progress.keys() - {"lr", "class"}
    settings.update({key: group[key] for key in from_config if key in group})
    settings.pop("params")
    if "lr" not in group or ("max_lr" in group and "max_lr" in saved):
        # OneCycleLR and CyclicLR do not use the optimizer's learning rate.
        return settings
    peak = peak_lr(group) if "lr" in changed else peak_lr(saved)
    settings["lr"] = peak
    settings.pop("initial_lr", None)
    if "initial_lr" in group:
        settings["initial_lr"] = peak
        settings["lr"] = peak * lr_factor(saved)
    return settings


def _config_settings(group: Mapping[str, Any], saved_groups: Sequence[Mapping[str, Any]]) -> State:
    """Returns the config's settings, at the checkpoint's point in the schedule."""
    settings = {key: value for key, value in group.items() if key != "params"}
    if "initial_lr" in group:
        first = next((each for each in saved_groups if "lr" in each), group)
        settings["lr"] = peak_lr(group) * lr_factor(first)
    return settings


class _Differences:
    """Settings that differ between the checkpoint and the config, with their groups."""

    def __init__(self, path: ConfigPath, total: int) -> None:
        self._path = path
        self._total = total
        self._groups: dict[tuple[str, str, str, bool], list[str]] = {}

    def add(
        self,
        optimizer: Optimizer,
        group: Mapping[str, Any],
        saved: Mapping[str, Any],
        settings: Mapping[str, Any],
        index: int,
    ) -> None:
        """Adds the differences of a group, and whether the config's values apply."""
        now, then = _comparable(optimizer, group), _comparable(optimizer, saved)
        applied = _comparable(optimizer, settings)
        progress = _progress(optimizer, group, saved)
        for key in sorted(now.keys() & then.keys() - progress.keys()):
            path = self._path / key
            is_changed = now[key] != then[key]
            # A value that was set at run time, such as a found learning rate, is kept silently.
            is_logged = applied[key] == now[key] or CONFIGURED not in saved
            if is_changed and is_logged:
                values = (path.format(now[key]), path.format(then[key]))
                entry = (key, *values, applied[key] == now[key])
                self._groups.setdefault(entry, []).append(group_name(group, index))

    def lines(self) -> list[str]:
        """Returns one line for each setting."""
        lines = []
        for (key, configured, saved, is_applied), names in sorted(self._groups.items()):
            where = "" if len(names) == self._total else f" (in {', '.join(names)})"
            setting = f"{(self._path / key).name}={configured}{where}"
            suggestion = (self._path / "resume").override("config")
            lines.append(
                f"{setting} replaces the checkpoint's {saved}"
                if is_applied
                else f"{setting} is not used: the checkpoint's {saved} is kept. To use the"
                f" config's, set {suggestion}"
            )
        return lines


class _Origin(NamedTuple):
    """The entry of a parameter in the checkpoint."""

    key: Any
    """Its key in the state: a position, or with torch.distributed.checkpoint its name."""
    group: int
    name: str


def _origins(
    saved: State,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    path: ConfigPath,
) -> list[list[_Origin | None]]:
    """Returns the entry in the checkpoint of each parameter, by group."""
    saved_groups = saved["param_groups"]
    # torch.distributed.checkpoint moves the settings of groups that have been split.
    owners = {
        clean_name(name): number
        for number, group in enumerate(saved_groups)
        for name in group.get("param_names", ())
    }
    known = [
        _Origin(key, owners.get(name, number), name)
        for number, group in enumerate(saved_groups)
        for key, name in zip(group["params"], _saved_names(group), strict=True)
    ]
    own = [group.get("param_names") for group in groups]
    if all(each.name for each in known) and all(own):
        by_name = {each.name: each for each in known}
        origins = [[by_name.get(clean_name(name)) for name in row or ()] for row in own]
        if not any(origin for row in origins for origin in row):
            raise path.error(
                "trains none of the parameters in the checkpoint, which are"
                f" {', '.join(list(by_name)[:3])}, …",
                "Resume it with the module that saved it",
            )
        return origins
    return _origins_by_position(
        [each._replace(name=f"parameter {each.key}") for each in known], groups, names, path
    )


def _saved_names(group: Mapping[str, Any]) -> list[str]:
    """Returns the names of a saved group's parameters; empty strings if it has none."""
    if all(isinstance(each, str) for each in group["params"]):
        return [clean_name(each) for each in group["params"]]
    return [clean_name(each) for each in group.get("param_names", [""] * len(group["params"]))]


def _origins_by_position(
    known: list[_Origin],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    path: ConfigPath,
) -> list[list[_Origin | None]]:
    """Returns the entries in a checkpoint without names, by group or in the module's order."""
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [
        sum(each.group == number for each in known) for number in range(known[-1].group + 1)
    ]
    if sizes == saved_sizes:
        remaining = iter(known)
        return [[next(remaining) for _ in range(size)] for size in sizes]
    trained = {clean_name(name) for group in groups for name in group.get("param_names", ())}
    order = list(names) if len(known) == len(names) else [each for each in names if each in trained]
    if len(saved_sizes) != 1 or len(known) != len(order):
        raise path.error(
            f"has groups of {sizes} parameters, but the checkpoint, which has no parameter names,"
            f" has groups of {saved_sizes}",
            "Configure the groups of the checkpoint",
        )
    by_name = dict(zip(order, known, strict=True))
    return [[by_name.get(clean_name(name)) for name in group["param_names"]] for group in groups]


def _describe_moves(
    saved: State,
    groups: Sequence[Mapping[str, Any]],
    origins: Sequence[Sequence[_Origin | None]],
    path: ConfigPath,
) -> Iterator[str]:
    """Yields lines about parameters that are new, frozen or removed."""
    found = {origin.key for row in origins for origin in row if origin}
    new = [
        name
        for group, row in zip(groups, origins, strict=True)
        for name, origin in zip(group.get("param_names", row), row, strict=True)
        if origin is None
    ]
    if new:
        yield f"{path.name}: no saved state of {_list_names(new)}; their moments start at 0"
    frozen = [
        origin.name
        for group, row in zip(groups, origins, strict=True)
        for parameter, origin in zip(group["params"], row, strict=True)
        if origin and saved["state"].get(origin.key) and not parameter.requires_grad
    ]
    if frozen:
        yield (
            f"{path.name}: {_list_names(frozen)} were trained in the checkpoint and are now"
            " frozen. They are not trained until they are unfrozen"
        )
    removed = [
        name
        for group in saved["param_groups"]
        for key, name in zip(group["params"], _saved_names(group), strict=True)
        if key not in found and name and saved["state"].get(key)
    ]
    if removed:
        names = _list_names(removed)
        yield f"{path.name}: the checkpoint's state of {names} is discarded: not trained here"


def _progress(optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any]) -> State:
    """Returns the entries of a saved group that are progress, such as a step count, not settings.

    The constructor does not take them, or the first step sets them because the config does not.
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
        if key not in (*CURRENT_KEYS, "initial_lr") and (key in counts or group.get(key) is None)
    }


def _fit_state(
    entry: State,
    parameter: Tensor,
    settings: State,
    optimizer: Optimizer,
    name: str,
    path: ConfigPath,
) -> State:
    """Returns a parameter's saved state, with `max_exp_avg_sq` if and only if amsgrad is set."""
    if entry and isinstance(optimizer, Adam) and not {"exp_avg", "exp_avg_sq"} <= {*entry}:
        raise path.error(
            f"is Adam, but the checkpoint's state of {name} has {', '.join(map(str, entry))}",
            f"Resume it with the optimizer that saved it, or {FROM_WEIGHTS}",
        )
    moment = entry.get("exp_avg")
    if isinstance(moment, Tensor) and moment.shape != parameter.shape:
        raise path.error(
            f"trains {name} with the shape {tuple(parameter.shape)}, but the checkpoint's has"
            f" {tuple(moment.shape)}",
            "Resume it with the module that saved it",
        )
    if not isinstance(optimizer, Adam) or not entry:
        return entry
    kept = {key: value for key, value in entry.items() if key != "max_exp_avg_sq"}
    if settings.get("amsgrad"):
        # A new maximum starts at the current second moment.
        kept["max_exp_avg_sq"] = entry.get("max_exp_avg_sq", entry["exp_avg_sq"].clone())
    return kept


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
