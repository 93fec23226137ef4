"""Documentation of the configs, for `lightning-adam explain` and the pages of `docs`."""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from lightning_adam.config.errors import format_value
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.optimizer import (
    AdamConfig,
    CustomOptimizerConfig,
    GroupConfig,
    LayerDecayConfig,
)
from lightning_adam.config.schedule import (
    SCHEDULES,
    DecayScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
    WarmupScheduleConfig,
)
from lightning_adam.config.tune import SpaceConfig, TuneConfig


class FieldDoc(NamedTuple):
    """A documented field of a config, or member of an enum."""

    name: str
    type: str
    """The type, without ranges; empty for a member of an enum."""
    meaning: str


class Section(NamedTuple):
    """A config, and the path of its fields on the command line."""

    title: str
    path: str
    config: type

    @property
    def summary(self) -> str:
        """The config's docstring without its example."""
        return (inspect.getdoc(self.config) or "").partition("\n\nExample:")[0]

    @property
    def fields(self) -> list[FieldDoc]:
        """The fields that the class itself declares."""
        return list(field_docs(self.config))

    def default(self, name: str) -> str:
        """Returns a field's default as an override.

        Example:
            >>> TOPICS["optimizer"][0].default("betas")
            'optimizer.betas=[0.9,0.999]'
        """
        return f"{self.path}.{name}={format_value(getattr(self.config(), name))}"


DECAY_SCHEDULES = [
    name for name, each in SCHEDULES.items() if issubclass(each, DecayScheduleConfig)
]
TOPICS: dict[str, list[Section]] = {
    "optimizer": [
        Section("lightning_adam/optimizer=adam, adamw", "optimizer", AdamConfig),
        Section("An item of optimizer.groups", "optimizer.groups.0", GroupConfig),
        Section("optimizer.layer_decay", "optimizer.layer_decay", LayerDecayConfig),
        Section("lightning_adam/optimizer=custom", "optimizer", CustomOptimizerConfig),
    ],
    "scheduler": [
        Section("All schedules", "scheduler", ScheduleConfig),
        Section("All schedules except custom", "scheduler", StepScheduleConfig),
        Section("All schedules except one_cycle and custom", "scheduler", WarmupScheduleConfig),
        Section(", ".join(DECAY_SCHEDULES), "scheduler", DecayScheduleConfig),
        *(
            Section(f"lightning_adam/scheduler={name}", "scheduler", config)
            for name, config in SCHEDULES.items()
        ),
    ],
    "monitor": [Section("lightning_adam/monitor=default", "adam_monitor", MonitorConfig)],
    "tune": [
        Section("hydra/sweeper=adam_tune", "hydra.sweeper", TuneConfig),
        Section("hydra.sweeper.space", "hydra.sweeper.space", SpaceConfig),
    ],
}
"""The configs by topic."""


def explain(section: Section) -> str:
    """Returns the fields of a config with their defaults, meanings and sources.

    Example:
        >>> print(explain(TOPICS["optimizer"][2]))  # doctest: +ELLIPSIS
        optimizer.layer_decay
        Layer-wise learning-rate decay, from the output to the input, for fine-tuning.
        ...
          optimizer.layer_decay.pattern=null
              Path of the layers, with `*` for the layer's number: ...
    """
    lines = [section.title, section.summary]
    for field in section.fields:
        lines += ["", f"  {section.default(field.name)}"]
        lines.append(textwrap.indent(textwrap.fill(field.meaning, 90), " " * 6))
    return "\n".join(lines)


def field_docs(declaring: type) -> Iterator[FieldDoc]:
    """Yields the documented fields of a config or members of an enum.

    Example:
        >>> [(name, type) for name, type, _ in field_docs(LayerDecayConfig)]
        [('pattern', 'str | None'), ('rate', 'float | None')]
        >>> from lightning_adam.config.optimizer import Resume
        >>> [name for name, _, _ in field_docs(Resume)]
        ['checkpoint', 'config']
    """
    (definition,) = ast.parse(inspect.getsource(declaring)).body
    assert isinstance(definition, ast.ClassDef)
    types = get_type_hints(declaring)
    for entry, following in itertools.pairwise(definition.body):
        if not isinstance(entry, ast.AnnAssign | ast.Assign) or not isinstance(following, ast.Expr):
            continue
        target = entry.target if isinstance(entry, ast.AnnAssign) else entry.targets[0]
        assert isinstance(target, ast.Name)
        meaning = " ".join(ast.literal_eval(following.value).split())
        yield FieldDoc(target.id, _type_name(types.get(target.id, "")), meaning)


def _type_name(hint: Any) -> str:
    """Returns a type as source code, without module names."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return "None" if hint is type(None) else hint.__name__
    return re.sub(r"[\w.]+\.(?=\w)", "", str(hint))
