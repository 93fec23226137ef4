"""Configs in words: behind `lightning-adam explain`, and on the pages of `docs`.

Imports neither torch nor lightning.
"""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from lightning_adam.config import schema
from lightning_adam.config.errors import as_typed
from lightning_adam.config.reading import CustomOptimizer


class Documented(NamedTuple):
    """A name that a class declares, with the string after it."""

    name: str
    type: str
    """As it is written; empty where none is."""
    meaning: str


class Section(NamedTuple):
    """A config, and the place its fields have on the command line."""

    title: str
    place: str
    config: type

    @property
    def summary(self) -> str:
        """What the config is, without the example."""
        return (inspect.getdoc(self.config) or "").partition("\n\nExample:")[0]

    @property
    def fields(self) -> list[Documented]:
        """Its own fields, in their order."""
        return list(documented(self.config))

    def default(self, name: str) -> str:
        """A field's default, as an override is typed.

        Example:
            >>> TOPICS["optimizer"][0].default("betas")
            'optimizer.betas=[0.9,0.999]'
        """
        return f"{self.place}.{name}={as_typed(getattr(self.config(), name))}"


TOPICS: dict[str, list[Section]] = {
    "optimizer": [
        Section("lightning_adam/optimizer=adam, adamw", "optimizer", schema.AdamConfig),
        Section("One of optimizer.groups", "optimizer.groups.0", schema.GroupConfig),
        Section("optimizer.layer_decay", "optimizer.layer_decay", schema.LayerDecayConfig),
        Section("lightning_adam/optimizer=custom", "optimizer", CustomOptimizer),
    ],
    "scheduler": [
        Section("Every schedule", "scheduler", schema.SchedulerConfig),
        Section("All but plateau and custom", "scheduler", schema.StepwiseConfig),
        *(
            Section(f"lightning_adam/scheduler={name}", "scheduler", config)
            for name, config in schema.SCHEDULERS.items()
        ),
    ],
    "monitor": [Section("lightning_adam/monitor=default", "adam_monitor", schema.MonitorConfig)],
    "tune": [
        Section("hydra/sweeper=adam_tune", "hydra.sweeper", schema.TuneConfig),
        Section("One of hydra.sweeper.stages", "hydra.sweeper.stages.lr", schema.StageConfig),
    ],
}
"""The configs that can be explained."""


def explain(section: Section) -> str:
    """A config's own fields, each with its default, its meaning and its source.

    Example:
        >>> print(explain(TOPICS["optimizer"][2]))  # doctest: +ELLIPSIS
        optimizer.layer_decay
        Learning rates that fall geometrically from the output to the input, for fine-tuning.
        ...
          optimizer.layer_decay.pattern=null
              Path of the layers, `*` standing for their number: ...
    """
    lines = [section.title, section.summary]
    for field in section.fields:
        lines += ["", f"  {section.default(field.name)}"]
        lines.append(textwrap.indent(textwrap.fill(field.meaning, 90), " " * 6))
    return "\n".join(lines)


def documented(declaring: type) -> Iterator[Documented]:
    """The names that a class itself declares and documents, by the string after each.

    Example:
        >>> [(name, type) for name, type, _ in documented(schema.LayerDecayConfig)]
        [('pattern', 'str | None'), ('rate', 'float | None')]
        >>> [name for name, _, _ in documented(schema.Resume)]
        ['checkpoint', 'config']
    """
    (definition,) = ast.parse(inspect.getsource(declaring)).body
    assert isinstance(definition, ast.ClassDef)
    for entry, following in itertools.pairwise(definition.body):
        if not isinstance(entry, ast.AnnAssign | ast.Assign) or not isinstance(following, ast.Expr):
            continue
        target = entry.target if isinstance(entry, ast.AnnAssign) else entry.targets[0]
        assert isinstance(target, ast.Name)
        written = ast.unparse(entry.annotation) if isinstance(entry, ast.AnnAssign) else ""
        meaning = " ".join(ast.literal_eval(following.value).split())
        yield Documented(target.id, written, meaning)
