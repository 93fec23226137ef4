"""Parses a config in any form to a typed, validated value with its path.

The forms are a composed Hydra node, structured or not, a dict, a dataclass instance, and the
`functools.partial` that Hydra creates for a node with `_target_` and `_partial_: true`.

The dataclasses declare the types and ranges of their fields; pydantic validates them. pydantic is
imported when the first config is parsed, because every Hydra app of the environment loads this
file.
"""

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lightning_adam._compat.hydra import (
    Call,
    app_config,
    is_composed,
    partial_key,
    running_call,
)
from lightning_adam._compat.omegaconf import full_key, root_of
from lightning_adam.config.errors import (
    UNSET,
    ConfigError,
    ConfigPath,
    Placeholder,
    Source,
    nearest,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config", covariant=True)


PLAIN_WORDS = {
    "^(Input|Value) should be": "must be",
    r"^\w+ should have": "must have",
    ", unable to .*| after validation": "",
    "a valid (?=[aeiou])": "an ",
    "a valid ": "a ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
"""Replacements in the messages of pydantic."""


class Limits:
    """The range or length of a field, as metadata of its type.

    Args:
        limits: `gt`, `ge`, `lt` and `le` of a number; `min_length` and `max_length` of a list.
    """

    def __init__(self, **limits: float) -> None:
        self.limits = limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        schema = {**handler(source), **self.limits}
        if source not in (float, int):
            return schema
        return core_schema.no_info_before_validator_function(_reject_bool, schema)


def _reject_bool(value: Any) -> Any:
    """Raises for True and False, which pydantic accepts as numbers."""
    from pydantic_core import PydanticCustomError

    if isinstance(value, bool):
        raise PydanticCustomError("not_bool", "Input should be a number")
    return value


@dataclass(frozen=True, eq=False)
class Example:
    """A value to suggest in errors, for a field without a suitable default."""

    value: Any


Positive = Annotated[float, Limits(gt=0)]
NotNegative = Annotated[float, Limits(ge=0)]
Fraction = Annotated[float, Limits(ge=0, le=1)]
PositiveFraction = Annotated[float, Limits(gt=0, le=1)]
Integer = Annotated[int, Limits(lt=2**63)]
Count = Annotated[int, Limits(ge=1, lt=2**63)]
CountOrZero = Annotated[int, Limits(ge=0, lt=2**63)]


@dataclass
class BaseConfig:
    """Base of the configs, with the options of pydantic. LightningCLI requires a dataclass."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
        "coerce_numbers_to_str": True,
    }


class Choice(str, Enum):
    """A setting with a fixed set of values; `str` returns its value."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class ParsedConfig(Generic[Config]):
    """A validated config and its path."""

    config: Config
    path: ConfigPath


def locate(node: Any, default: str) -> ConfigPath:
    """Returns the path of a config, even if Hydra has detached it from its parent.

    The path is known only while `instantiate` calls a constructor, and within a Hydra app. Store it
    for errors that are raised later.

    Args:
        node: The config in any form.
        default: Its usual path, for a config that is not part of a larger one.

    Example:
        >>> cfg = OmegaConf.create({"model": {"optimizer": {"lr": -1}}})
        >>> (locate(cfg.model.optimizer, "optimizer") / "lr").override(0.001)
        'cfg.model.optimizer.lr=0.001'
        >>> (locate({"lr": -1}, "optimizer") / "lr").override(0.001)
        'lr=0.001'
    """
    if isinstance(node, ParsedConfig):
        return node.path
    root, key = _origin(node, running_call())
    app = app_config()
    if app is not None:
        app_path = _path_in_app(app, node, key, default)
        is_hydra = bool(app_path)
        root, key = (app, app_path) if is_hydra else (root, key)
    else:
        is_hydra = HydraConfig.initialized() or (bool(key) and is_composed(root))
    written = _select(root, key) if root is not None and key else None
    if written is not None:
        # The path of an interpolation is that of its target.
        node, key = written, full_key(written) or key
    source = Source.HYDRA if is_hydra else Source.OMEGACONF if key else Source.PYTHON
    path = key or default
    return ConfigPath(path, "", source, frozenset(_keys(to_plain(node))), _added_keys(path))


def locate_argument(name: str) -> ConfigPath | None:
    """Returns the path of an argument of the constructor that `instantiate` is calling.

    Args:
        name: Name of the argument.

    Returns:
        The path; None if Hydra is not calling a constructor with such an argument.

    Example:
        >>> locate_argument("optimizer") is None
        True
    """
    call = running_call()
    node = None if call is None else call.arguments.get(name)
    return None if node is None else locate(node, name)


def _origin(node: Any, call: Call | None) -> tuple[DictConfig | None, str]:
    """Returns the config that contains a node, and the path of the node; empty if it is unknown."""
    if call is not None:
        key = _path_within(call.arguments, node)
        name, _, rest = key.partition(".")
        if name in call.given and call.path == full_key(call.config):
            # A keyword argument of `instantiate` replaces the value in the config.
            root, key = _origin(call.given[name], None)
            return root, f"{key}.{rest}".strip(".") if key else ""
        if key:
            return root_of(call.config), f"{call.path}.{key}".lstrip(".")
        if isinstance(node, dict) and call.arguments and call.arguments.keys() <= node.keys():
            # The arguments of the target are the settings of the node.
            return root_of(call.config), call.path
    return root_of(node), full_key(node) or partial_key(node)


def _path_in_app(app: DictConfig, node: Any, key: str, default: str) -> str:
    """Returns the path of a config in the app's config; empty if it is not part of it."""
    at_key = _select(app, key) if key else None
    if at_key is not None:
        key = full_key(at_key)
    content = to_plain(node)
    equal = [full_key(each) for each in _nodes(app) if _have_same_settings(to_plain(each), content)]
    if key in equal or (at_key is not None and not equal):
        return key
    # Hydra detaches nodes from their parents, which shortens their keys.
    name = (key or default).rpartition(".")[2]
    ending = [full_key(each) for each in _nodes(app) if key and full_key(each).endswith(f".{key}")]
    same_name = [path for path in equal if path.rpartition(".")[2] == name]
    return next(iter(same_name or equal or (ending if len(ending) == 1 else [])), "")


def _select(root: DictConfig, key: str) -> DictConfig | None:
    """Returns the node at a path, with interpolations resolved; None if there is none."""
    try:
        node = OmegaConf.select(root, key)
    except OmegaConfBaseException:
        return None
    return node if isinstance(node, DictConfig) else None


def _path_within(values: Any, node: Any) -> str:
    """Returns the path of a node in nested values; empty if they do not contain it."""
    for name, value in _children(values):
        if value is node:
            return name
        path = _path_within(value, node)
        if path:
            return f"{name}.{path}"
    return ""


def _nodes(config: Any) -> Iterator[DictConfig]:
    """Yields the nodes of a config, recursively."""
    for _, child in _children(config):
        if isinstance(child, DictConfig):
            yield child
        yield from _nodes(child)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the names or indices and values of a container; skips interpolations and `???`."""
    names: Iterable[Any] = ()
    if isinstance(value, Mapping):
        names = value
    elif isinstance(value, list | tuple | ListConfig):
        names = range(len(value))
    for name in names:
        is_unreadable = OmegaConf.is_config(value) and (
            OmegaConf.is_missing(value, name) or OmegaConf.is_interpolation(value, name)
        )
        if not is_unreadable:
            yield str(name), value[name]


def _have_same_settings(one: Any, other: Any) -> bool:
    """Returns whether two configs have the same settings, or the same target if they have none."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    settings, others = (
        {name: value for name, value in each.items() if not str(name).startswith("_")}
        for each in (one, other)
    )
    targets = one.get("_target_"), other.get("_target_")
    return settings == others and (
        bool(settings) or (None not in targets and targets[0] == targets[1])
    )


def _added_keys(path: str) -> frozenset[str]:
    """Returns the settings of a config that the app's command line adds with a `+`."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = (each.lstrip("+").partition("=")[0] for each in overrides if each.startswith("+"))
    return frozenset(key.removeprefix(f"{path}.") for key in keys if key.startswith(f"{path}."))


def _keys(content: Any) -> Iterator[str]:
    """Yields the paths of all values in plain containers."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for name, value in pairs:
            yield str(name)
            yield from (f"{name}.{key}" for key in _keys(value))


def to_dict(node: Any, path: ConfigPath) -> dict[str, Any]:
    """Converts a config to a plain dict, with its interpolations resolved.

    Args:
        node: A composed Hydra node, structured or not, a dict or a dataclass instance.
        path: Its path.

    Raises:
        ConfigError: If it is none of these, or a value is missing or cannot be resolved.

    Example:
        >>> to_dict(OmegaConf.create({"lr": 0.1, "eps": "${.lr}"}), ConfigPath("optimizer"))
        {'lr': 0.1, 'eps': 0.1}
    """
    if isinstance(node, type) or not (is_dataclass(node) or isinstance(node, Mapping)):
        given = " ".join(repr(node).split())[:80]
        problem = "must be a config node, a dict, a dataclass or a functools.partial, not"
        raise path.error(f"{problem} {given}")
    try:
        if is_dataclass(node):
            node = {entry.name: getattr(node, entry.name) for entry in fields(node) if entry.init}
        if not isinstance(node, DictConfig):
            node = OmegaConf.create({name: _scalar(value) for name, value in node.items()})
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _resolution_error(error, path) from None
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def validate(schema: type[Config], values: Mapping[str, Any], path: ConfigPath) -> Config:
    """Builds a dataclass from plain values, and checks names, types and ranges.

    Args:
        schema: The dataclass.
        values: The values by field.
        path: Their path.

    Raises:
        ConfigError: If a name is not a field, or a value has the wrong type or range.

    Example:
        >>> from lightning_adam.config.optimizer import LayerDecayConfig
        >>> path = ConfigPath("optimizer.layer_decay")
        >>> validate(LayerDecayConfig, {"pattern": "net.*", "rate": "0.5"}, path)
        LayerDecayConfig(pattern='net.*', rate=0.5)
    """
    from pydantic import ValidationError

    try:
        config: Config = _adapter(schema).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise _convert_error(error.errors()[0], schema, values, path) from None
    return config


@functools.cache
def _adapter(schema: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _convert_error(
    error: Mapping[str, Any], schema: type[Any], values: Any, path: ConfigPath
) -> ConfigError:
    """Converts an error of pydantic to a `ConfigError` that suggests a valid value."""
    location = list(error["loc"])
    hint: Any = schema
    default: Any = UNSET
    while location and is_dataclass(hint):
        name = location.pop(0)
        path = path / name
        if error["type"] == "missing" and not location:
            return path.required()
        values = values[name]
        entries = {entry.name: entry for entry in fields(hint) if entry.init}
        if name not in entries:
            return path.unknown(values, entries)
        default = _default(entries[name])
        hint = get_type_hints(hint, include_extras=True)[name]
        configs = [each for each in _parts(hint) if isinstance(each, type) and is_dataclass(each)]
        if configs and location:
            if any(get_origin(part) in (list, dict) for part in _parts(hint)):
                # An item of a list or dict of configs.
                item = location.pop(0)
                path, values, default = path / item, values[item], UNSET
            hint = configs[0]
    problem = error["msg"]
    for pattern, replacement in PLAIN_WORDS.items():
        problem = re.sub(pattern, replacement, problem)
    if location:
        problem = f"has {error['input']!r}, which {problem}"
    words = re.findall("'(.*?)'", error.get("ctx", {}).get("expected", ""))
    examples = [each.value for each in _parts(hint) if isinstance(each, Example)]
    if words:
        close = nearest(str(error["input"]), words, 1, cutoff=0.0)
        examples = [close if isinstance(values, list) else close[0]]
    elif not examples and default not in (UNSET, None, MISSING):
        examples = [default]
    return path.invalid(values, problem, *examples[:1])


def _default(entry: "dataclasses.Field[Any]") -> Any:
    """Returns the default of a field, or UNSET."""
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return UNSET if entry.default is dataclasses.MISSING else entry.default


def _parts(hint: Any) -> Iterator[Any]:
    """Yields a type, its arguments and its metadata, recursively."""
    yield hint
    for each in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from _parts(each)


def _resolution_error(error: OmegaConfBaseException, path: ConfigPath) -> ConfigError:
    """Converts an error of OmegaConf, about a missing or unresolvable value, to a `ConfigError`.

    Raise it `from None`: Hydra would print OmegaConf's error below the message.
    """
    key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or ""))
    field = f"{key}.".removeprefix(f"{path}.").rstrip(".")
    path = path / field if field else path
    if isinstance(error, MissingMandatoryValue):
        return path.required()
    # The lines after the first repeat the key and the type.
    cause = str(error).partition("\n")[0]
    return path.error(f"cannot be resolved: {cause}", path.suggest(Placeholder("VALUE"), "Set"))


def split_target(
    node: Any, path: ConfigPath, own_fields: Iterable[str]
) -> tuple[functools.partial[Any], dict[str, Any]] | None:
    """Splits a node into its target with arguments, and the fields that belong to this package.

    Args:
        node: Any form of a config.
        path: Its path.
        own_fields: The fields that are not arguments of the target.

    Returns:
        The target with its arguments, and the values of the fields; None for a node that has no
        `_target_` and is not a `functools.partial`.

    Raises:
        ConfigError: If the target cannot be imported.

    Example:
        >>> node = {"_target_": "fractions.Fraction", "denominator": 4, "groups": []}
        >>> target, own = split_target(node, ConfigPath("optimizer"), ["groups"])
        >>> target(3), own
        (Fraction(3, 4), {'groups': []})
    """
    if isinstance(node, functools.partial):
        target = node
        own = {name: _to_plain(node.keywords[name]) for name in own_fields if name in node.keywords}
    elif isinstance(node, Mapping) and "_target_" in node:
        arguments = to_dict(node, path)
        own = {name: arguments.pop(name) for name in own_fields if name in arguments}
        target = _import(arguments, path)
    else:
        return None
    keywords = {
        name: _to_plain(value) for name, value in target.keywords.items() if name not in own
    }
    target = functools.partial(target.func, *target.args, **keywords)
    return target, own


def _import(arguments: Mapping[str, Any], path: ConfigPath) -> functools.partial[Any]:
    try:
        target = instantiate({**arguments, "_partial_": True, "_convert_": "all"})
    except (HydraException, ImportError, AttributeError, TypeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        # Hydra names the invalid node, which may be a child: schedulers[0], or schedulers0.
        key = re.search(r"full_key: (\S+)", str(error))
        child = re.sub(r"[.\[\]]", "", key[1]) if key else ""
        nodes = {name.replace(".", ""): (name, node) for name, node in _targets(arguments)}
        name, given = nodes.get(child, ("", arguments["_target_"]))
        path = path / name if name else path
        suggestion = (path / "_target_").suggest(_nearest_target(str(given)), "Set")
        problem = f"cannot be imported and called: {cause}"
        raise (path / "_target_").error(problem, suggestion, value=given) from error
    assert isinstance(target, functools.partial)
    return target


def _targets(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the paths and targets of the nodes within plain values."""
    for name, child in _children(values):
        if isinstance(child, Mapping) and "_target_" in child:
            yield f"{prefix}{name}", child["_target_"]
        yield from _targets(child, f"{prefix}{name}.")


def _nearest_target(target: str) -> str:
    """Returns the most similar callable in the target's module, or a placeholder."""
    module, _, name = target.rpartition(".")
    members = vars(sys.modules[module]) if module in sys.modules else {}
    names = {each.lower(): each for each, member in members.items() if callable(member)}
    close = nearest(name.lower(), names, 1)
    return f"{module}.{names[close[0]]}" if close else "package.module.Class"


def parameters_of(target: functools.partial[Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a target by their names; empty if its signature is unknown."""
    try:
        return dict(inspect.signature(target.func).parameters)
    except (TypeError, ValueError):
        return {}


def check_arguments(target: functools.partial[Any], path: ConfigPath) -> None:
    """Checks that the signature of the target accepts the arguments from the config.

    Raises:
        ConfigError: If it does not accept one.

    Example:
        >>> from fractions import Fraction
        >>> check_arguments(functools.partial(Fraction, denominator=4), ConfigPath("optimizer"))
    """
    parameters = parameters_of(target)
    if not parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    # The first argument is not from the config: the parameters, or the optimizer.
    names = list(parameters)[1:]
    for name, value in target.keywords.items():
        if name not in names:
            raise (path / name).unknown(value, names)


def target_name(target: functools.partial[Any]) -> str:
    """Returns the shortest import path of the target.

    Example:
        >>> target_name(functools.partial(OmegaConf))
        'omegaconf.OmegaConf'
    """
    called: Any = target.func
    name = getattr(called, "__qualname__", type(called).__qualname__)
    parts = str(called.__module__).split(".")
    for package in (".".join(parts[:length]) for length in range(1, len(parts))):
        if getattr(sys.modules.get(package), name, None) is called:
            return f"{package}.{name}"
    return f"{called.__module__}.{name}"


def merged_with_preset(path: ConfigPath, target: str, preset: str) -> ConfigError:
    """Returns the error of a `_target_` that is merged with the fields of a preset.

    Hydra merges them if the app has a config group with the same name.

    Example:
        >>> path = ConfigPath("optimizer")
        >>> print(merged_with_preset(path, "torch.optim.SGD", "lightning_adam/optimizer"))
        ... # doctest: +ELLIPSIS
        optimizer._target_=torch.optim.SGD is merged with the fields of lightning_adam/optimizer...
    """
    return (path / "_target_").error(
        f"is merged with the fields of {preset}, which do not belong to it",
        "Remove one of the two from the defaults list, or, for your own class, use"
        f" {preset_override(path, preset, 'custom')}",
        value=target,
    )


def preset_override(path: ConfigPath, preset: str, option: str) -> str:
    """Returns the override that selects another option of a preset, also in another package.

    Example:
        >>> preset_override(ConfigPath("optimizer"), "lightning_adam/optimizer", "custom")
        'lightning_adam/optimizer=custom'
        >>> preset_override(ConfigPath("model.adam"), "lightning_adam/optimizer", "custom")
        'lightning_adam/optimizer@model.adam=custom'
    """
    is_usual = path.config == preset.rpartition("/")[2] or path.source is not Source.HYDRA
    return f"{preset}{'' if is_usual else f'@{path.config}'}={option}"


def to_plain(value: Any) -> Any:
    """Converts a config in any form to dicts, lists and scalars, recursively.

    A `functools.partial` becomes the node that Hydra would instantiate to it. Other objects stay as
    they are.

    Example:
        >>> to_plain([functools.partial(dict, lr=0.1), OmegaConf.create([1])])
        [{'_target_': 'builtins.dict', '_partial_': True, 'lr': 0.1}, [1]]
    """
    if OmegaConf.is_config(value):
        try:
            value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:
            value = OmegaConf.to_container(value)
    if isinstance(value, functools.partial) and not value.args:
        value = {"_target_": target_name(value), "_partial_": True, **value.keywords}
    elif is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init}
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {name: to_plain(each) for name, each in value.items()}
    return [to_plain(each) for each in value] if type(value) is list else value


def _scalar(value: Any) -> Any:
    """Converts a numpy scalar to a Python scalar."""
    return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value


def _to_plain(value: Any) -> Any:
    """Converts the containers of OmegaConf in a value, also within partials."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, functools.partial):
        keywords = {name: _to_plain(each) for name, each in value.keywords.items()}
        return functools.partial(value.func, *value.args, **keywords)
    return [_to_plain(each) for each in value] if isinstance(value, list) else value
