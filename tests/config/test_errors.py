"""The syntax of settings in errors for each source; suggestions are valid input."""

import ast
import copy
import math
import pickle
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_adam import ConfigError
from lightning_adam.config.errors import (
    UNSET,
    ConfigPath,
    Source,
    format_override,
    format_value,
)
from lightning_adam.config.optimizer import GroupConfig, Resume, parse_optimizer
from lightning_adam.config.schedule import parse_schedule
from lightning_adam.monitor import environment
from tests.support.tables import each_row

OPTIMIZER = {source: ConfigPath("model.optimizer", source=source) for source in Source}

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1).filter(
    lambda text: "${" not in text
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | TEXT,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z][a-z_]*", fullmatch=True), inner)
    ),
    max_leaves=5,
)


def read_by_hydra(typed: str) -> object:
    (word,) = shlex.split(typed)
    return OverridesParser.create().parse_override(word).value()


def read_from_the_environment(typed: str) -> object:
    (word,) = shlex.split(typed)
    name, _, value = word.partition("=")
    assert name == "LIGHTNING_ADAM_MONITOR"
    return environment.settings(value)["statistics"]


def same(ours: object, theirs: object) -> bool:
    """Returns whether values are equal, except for texts that Hydra reads as other types."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, str) and theirs is None:
        return ours.lower() == "null"
    if isinstance(ours, str) and not isinstance(theirs, str):
        return str(theirs).lower() == ours.lower() or math.isclose(float(str(theirs)), float(ours))
    return ours == theirs


@settings(deadline=None, derandomize=True)
@given(VALUES)
@example("NULL")
def test_suggested_value_survives_the_shell_and_hydra(value: object) -> None:
    assert same(value, read_by_hydra(format_override("key", value)))
    assert same(value, read_by_hydra((OPTIMIZER[Source.HYDRA] / "key").override(value)))


@settings(deadline=None, derandomize=True)
@given(VALUES)
@example("it's")
@example("a b")
@example(["headline", "eps_*"])
def test_suggested_value_survives_the_shell_and_the_environment(value: object) -> None:
    path = environment.PATH / "statistics"
    assert same(value, read_from_the_environment(path.override(value)))


@settings(deadline=None, derandomize=True)
@given(VALUES)
def test_suggested_value_is_a_python_expression(value: object) -> None:
    name, _, expression = (OPTIMIZER[Source.PYTHON] / "key").override(value).partition("=")
    assert (name, ast.literal_eval(expression)) == ("key", value)


FORMATTED: list[tuple[Source, str, object, str]] = [
    (Source.HYDRA, "lr", 1e-8, "model.optimizer.lr=1e-08"),
    (Source.HYDRA, "fused", None, "model.optimizer.fused=null"),
    (Source.HYDRA, "resume", Resume.config, "model.optimizer.resume=config"),
    (Source.HYDRA, "groups.0.betas", (0.9, 0.95), "'model.optimizer.groups.0.betas=[0.9,0.95]'"),
    (Source.LIGHTNING_CLI, "lr", 1e-8, "--model.optimizer.lr=1e-08"),
    (Source.LIGHTNING_CLI, "fused", None, "--model.optimizer.fused=null"),
    (Source.LIGHTNING_CLI, "amsgrad", True, "--model.optimizer.amsgrad=true"),
    (Source.LIGHTNING_CLI, "resume", Resume.config, "--model.optimizer.resume=config"),
    (Source.LIGHTNING_CLI, "betas", (0.9, 0.95), "'--model.optimizer.betas=[0.9, 0.95]'"),
    (Source.OMEGACONF, "lr", 1e-8, "cfg.model.optimizer.lr=1e-08"),
    (Source.OMEGACONF, "fused", None, "cfg.model.optimizer.fused=None"),
    (Source.OMEGACONF, "groups.0.betas", (0.9, 1), "cfg.model.optimizer.groups[0].betas=[0.9, 1]"),
    (Source.PYTHON, "lr", 1e-8, "lr=1e-08"),
    (Source.PYTHON, "fused", None, "fused=None"),
    (Source.PYTHON, "amsgrad", True, "amsgrad=True"),
    (Source.PYTHON, "resume", Resume.config, "resume='config'"),
    (Source.PYTHON, "groups.0.betas", (0.9, 0.95), "groups.0.betas=[0.9, 0.95]"),
    (Source.ENVIRONMENT, "alert", True, "LIGHTNING_ADAM_MONITOR=alert=true"),
    (Source.ENVIRONMENT, "every_n_steps", 10, "LIGHTNING_ADAM_MONITOR=every_n_steps=10"),
    (Source.ENVIRONMENT, "scopes", ["model"], "LIGHTNING_ADAM_MONITOR='scopes=[model]'"),
]
"""A source, a setting with a value, and its format."""


def test_override_has_the_syntax_of_its_source() -> None:
    with each_row() as row:
        for source, field, value, expected in FORMATTED:
            with row(expected):
                assert (OPTIMIZER[source] / field).override(value) == expected


def test_key_that_the_config_lacks_is_added_on_the_command_line() -> None:
    keys = frozenset(["lr", "groups", "groups.0", "groups.0.name"])
    lacking: dict[Source, str] = {
        Source.HYDRA: "+model.optimizer.eps=1e-06",
        Source.LIGHTNING_CLI: "--model.optimizer.eps=1e-06",
        Source.OMEGACONF: "cfg.model.optimizer.eps=1e-06",
        Source.PYTHON: "eps=1e-06",
        Source.ENVIRONMENT: "LIGHTNING_ADAM_MONITOR=eps=1e-06",
    }
    with each_row() as row:
        for source, expected in lacking.items():
            with row(source):
                path = ConfigPath("model.optimizer", source=source, keys=keys)
                assert (path / "eps").override(1e-6) == expected
    path = ConfigPath("optimizer", keys=keys)
    assert (path / "lr").override(1) == "optimizer.lr=1"
    assert (path / "groups" / 0 / "name").override("a") == "optimizer.groups.0.name=a"
    assert (path / "groups" / 0 / "betas").override([0, 0]) == "'+optimizer.groups.0.betas=[0,0]'"
    error = (path / "eps").invalid(-1, "must be above 0", 1e-8)
    assert str(error) == "optimizer.eps=-1 must be above 0. Use for example +optimizer.eps=1e-08"


def test_dataclass_is_formatted_as_its_fields() -> None:
    head = GroupConfig("head", match="*")
    value = format_value([head])
    assert value.startswith("[{name:head,match:*,regex:null,")
    assert read_by_hydra(format_override("groups", [head])) == [vars(head)]


NAMES = {
    Source.HYDRA: "model.optimizer.lr",
    Source.LIGHTNING_CLI: "--model.optimizer.lr",
    Source.OMEGACONF: "cfg.model.optimizer.lr",
    Source.PYTHON: "lr",
    Source.ENVIRONMENT: "lr",
}
SUGGESTED = {
    Source.HYDRA: "model.optimizer.lr=0.001",
    Source.LIGHTNING_CLI: "--model.optimizer.lr=0.001",
    Source.OMEGACONF: "cfg.model.optimizer.lr=0.001",
    Source.PYTHON: "lr=0.001",
    Source.ENVIRONMENT: "LIGHTNING_ADAM_MONITOR=lr=0.001",
}


@pytest.mark.parametrize("source", list(Source))
def test_error_has_path_value_problem_and_suggestion(source: Source) -> None:
    path = OPTIMIZER[source] / "lr"
    error = path.invalid(-1, "must be above 0", 0.001, 0.01)
    assert (error.path, error.value) == (path, -1)
    assert error.problem == "must be above 0"
    assert error.suggestion == f"Use for example {SUGGESTED[source]}"
    assert (path.name, str(path)) == (NAMES[source], "model.optimizer.lr")
    assert str(error) == repr(error) == f"{NAMES[source]}=-1 must be above 0. {error.suggestion}"


@pytest.mark.parametrize("source", list(Source))
def test_error_of_a_whole_config_names_its_path(source: Source) -> None:
    error = OPTIMIZER[source].error("must be a config node")
    before = {Source.LIGHTNING_CLI: "--", Source.OMEGACONF: "cfg."}.get(source, "")
    assert str(error) == f"{before}model.optimizer must be a config node"
    assert (error.value, error.suggestion) == (UNSET, "")


def test_error_without_a_path_is_a_sentence() -> None:
    assert str(ConfigError("Lit has no optimizer config")) == "Lit has no optimizer config"
    error = ConfigError("Only 1 of 2 processes have this value", "Set it on every node")
    assert str(error) == "Only 1 of 2 processes have this value. Set it on every node"
    assert (error.path, error.value) == (None, UNSET)
    assert str(ConfigError("Is it importable?", "Install it")) == "Is it importable? Install it"
    assert str(ConfigError("torch: no.", "Use Adam")) == "torch: no. Use Adam"


def test_required_setting_is_suggested_with_a_placeholder() -> None:
    written = {source: (path / "lr").required().suggestion for source, path in OPTIMIZER.items()}
    assert written == {
        Source.HYDRA: "Set model.optimizer.lr=VALUE",
        Source.LIGHTNING_CLI: "Set --model.optimizer.lr=VALUE",
        Source.OMEGACONF: "Set cfg.model.optimizer.lr=VALUE",
        Source.PYTHON: "Set lr=VALUE",
        Source.ENVIRONMENT: "Set LIGHTNING_ADAM_MONITOR=lr=VALUE",
    }


def test_list_item_is_suggested_in_words_for_lightning_cli() -> None:
    """LightningCLI has no option for it."""
    group = OPTIMIZER[Source.LIGHTNING_CLI] / "groups" / 1
    invalid = (group / "match").invalid("a", "matches nothing", "net.*")
    assert str(invalid) == (
        "--model.optimizer.groups.1.match=a matches nothing."
        " In item 1 of --model.optimizer.groups, use for example match: net.*"
    )
    required = (group / "name").required()
    assert required.suggestion == "In item 1 of --model.optimizer.groups, set name: VALUE"


def test_none_is_a_value() -> None:
    error = (OPTIMIZER[Source.HYDRA] / "lr").invalid(None, "must be a number", 0.1)
    assert error.value is None
    assert str(error).startswith("model.optimizer.lr=null must be a number. ")


def test_unknown_setting_suggests_the_nearest_name_with_the_value() -> None:
    path = ConfigPath("optimizer")
    error = (path / "beta").unknown([0.9, 0.95], ["lr", "betas"])
    assert str(error) == (
        "optimizer.beta=[0.9,0.95] is not a setting. Use for example 'optimizer.betas=[0.9,0.95]'"
    )
    nested = (path / "groups" / 0 / "lr_scal").unknown(3, ["lr_scale"])
    assert nested.suggestion == "Use for example optimizer.groups.0.lr_scale=3"
    error = (path / "momentum").unknown(0.9, ["lr", "betas"])
    assert str(error) == "optimizer.momentum=0.9 is not a setting. Use one of lr, betas"


def errors() -> list[ConfigError]:
    path = OPTIMIZER[Source.LIGHTNING_CLI] / "lr"
    return [
        path.invalid([1], "must be a number", 0.001),
        path.invalid(None, "must be a number", 0.001),
        path.required(),
        ConfigError("Lit has no optimizer config"),
        ConfigError("must be above 0", "Use 0.001", path=path, value=-1),
    ]


@pytest.mark.parametrize(
    "copied",
    [*(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in (2, 5)), copy.deepcopy],
    ids=["pickle 2", "pickle 5", "deepcopy"],
)
def test_error_is_the_same_in_another_process(copied: Callable[[Any], Any]) -> None:
    """Hydra's launchers and Lightning's processes pickle errors."""
    with each_row() as row:
        for error in errors():
            with row(error):
                other = copied(error)
                assert type(other) is ConfigError
                assert (str(other), repr(other)) == (str(error), repr(error))
                assert vars(other) == vars(error)
                assert other.args == error.args


def test_special_values_are_formatted_in_hydra_syntax() -> None:
    assert [format_value(value) for value in (None, True, 1e-8, "net.*")] == [
        "null",
        "true",
        "1e-08",
        "net.*",
    ]


APP = """
import hydra
from omegaconf import OmegaConf

from lightning_adam.config.optimizer import parse_optimizer


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    forms = {"dict": dict, "container": OmegaConf.to_container, "node": lambda node: node}
    parse_optimizer(forms[cfg.form](cfg.optimizer))


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("form", ["dict", "container", "node"])
def test_hydra_app_prints_the_override(
    form: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In a running app, a dict is also overridden on the command line."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["app.py", f"+form={form}", "+optimizer.lr=-1"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path("app.py", run_name="__main__")
    printed = capsys.readouterr().err.splitlines()
    message = "optimizer.lr=-1 must be above 0. Use for example ++optimizer.lr=0.001"
    # Hydra 1.4 prints the class before it.
    assert any(line.endswith(message) for line in printed)


def test_python_config_is_formatted_as_python_outside_an_app() -> None:
    with pytest.raises(ConfigError, match=r"^lr=-1 must be above 0\. Use for example lr=0\.001$"):
        parse_optimizer({"lr": -1})
    with pytest.raises(ConfigError, match=r"^warmup_steps=-1 must be .* warmup_steps=100$"):
        parse_schedule(OmegaConf.create({"name": "cosine", "warmup_steps": -1}))
