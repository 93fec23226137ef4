"""A Hydra app of a user: its help, completions and errors; and `lightning-adam explain`."""

import contextlib
import functools
import io
import itertools
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import lightning_adam
from lightning_adam import __version__, cli
from lightning_adam.config import monitor, optimizer, schedule, tune
from lightning_adam.config.explain import TOPICS
from lightning_adam.config.monitor import MonitorConfig
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.config.schedule import SCHEDULES
from lightning_adam.config.tune import SpaceConfig
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.support.commands import (
    BIN,
    REPOSITORY,
    Command,
    Finished,
    environment,
    run,
    run_text,
    succeed,
    write_files,
)
from tests.support.tables import each_row

TRAINED = "trained with: "
APP = f"""
import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_adam import AdamMixin

    class Lit(AdamMixin, L.LightningModule):
        def __init__(self, optimizer, scheduler):
            super().__init__(optimizer=optimizer, scheduler=scheduler)
            self.net = nn.Linear(cfg.data.size, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    print("hydra:", hydra.__version__)
    place = cfg.get("model", cfg)
    samples = TensorDataset(torch.randn(8, cfg.data.size))
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Lit(place.optimizer, place.scheduler), DataLoader(samples, batch_size=4))
    print("{TRAINED}" + type(trainer.optimizers[0]).__name__, trainer.global_step)


if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - lightning_adam/optimizer: adamw
  - lightning_adam/scheduler: cosine
  - lightning_adam/monitor: default
  - data: small
  - _self_
"""
OWN_OPTIMIZER = "{_target_: torch.optim.SGD, _partial_: true, lr: 0.1, momentum: 0.9}"
OWN_SCHEDULER = "{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 3}"
FILES = {
    "app.py": APP,
    "conf/config.yaml": CONFIG,
    "conf/data/small.yaml": "size: 3",
    "conf/data/large.yaml": "size: 9",
    "conf/optimizer/sgd.yaml": OWN_OPTIMIZER,
    "conf/scheduler/step.yaml": OWN_SCHEDULER,
}
PRESETS = {
    "lightning_adam/monitor": ["default"],
    "lightning_adam/optimizer": ["adam", "adamw", "custom"],
    "lightning_adam/scheduler": sorted(SCHEDULES),
}
MERGED = {
    "optimizer": ("torch.optim.SGD", "AdamConfig"),
    "scheduler": ("torch.optim.lr_scheduler.StepLR", "CosineConfig"),
}
"""The target of a user's own node, and the type of ours it is merged with."""
CONFIGS: dict[str, type] = {
    name: each
    for module in (optimizer, schedule, monitor, tune)
    for name, each in vars(module).items()
    if is_dataclass(each) and isinstance(each, type) and each.__module__ == module.__name__
    if each is not tune.Range
}
HYDRA_1_4 = "hydra-core==1.4.0rc3"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    write_files(folder, FILES)
    return folder


def python(app: Path, *arguments: str, **variables: str) -> Finished:
    """Runs the app in a process; another Hydra than that of the tests needs a new Python."""
    command: Command = [BIN / "python", "app.py", *arguments]
    return run(command, app, environment(BIN, **variables), cold="PYTHONPATH" in variables)


Shown = Callable[..., Finished]


@pytest.fixture
def show(app: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Runs the app in the process of the tests, as far as it only composes and prints."""

    def shown(*arguments: str, **variables: str) -> Finished:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["app.py", *arguments])
        return printed(lambda: runpy.run_path(str(app / "app.py"), run_name="__main__"))

    return shown


def printed(main: Callable[[], object]) -> Finished:
    """What a program prints and exits with."""
    code, output = 0, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Finished(code, output.getvalue())


def test_help_lists_the_presets_beside_the_users_groups_and_no_schemas(show: Shown) -> None:
    shown = show("--help")
    assert shown.returncode == 0, shown.output
    listed = re.findall(r"^([\w/]+): ([\w, ]+)$", shown.output, re.MULTILINE)
    groups = {name: options.split(", ") for name, options in listed}
    own = {"data": ["large", "small"], "optimizer": ["sgd"], "scheduler": ["step"]}
    assert groups == PRESETS | own
    assert "lightning_adam_" not in shown.output


def test_editable_install_offers_what_the_wheel_does() -> None:
    """Every app of the environment has all of `conf` in its search path, and in its help."""
    assert Path(lightning_adam.__file__).parents[1] == REPOSITORY
    assert {each.name for each in (REPOSITORY / "conf").iterdir()} == {"hydra", "lightning_adam"}


COMPLETIONS = {
    "lightning_adam/": [f"{group}=" for group in PRESETS],
    "lightning_adam/optimizer=": [
        f"lightning_adam/optimizer={option}" for option in ("adam", "adamw", "custom")
    ],
    "optimizer.b": ["optimizer.betas."],
    "scheduler.w": [f"scheduler.warmup_{unit}=" for unit in ("epochs", "ratio", "steps")],
}


def completions(show: Callable[..., Finished], typed: str) -> list[str]:
    """What the tab key offers after what was typed."""
    line = f"python app.py {typed}"
    offered = show("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert offered.returncode == 0, offered.output
    return offered.output.split()


def test_tab_key_completes_groups_options_and_fields(show: Shown) -> None:
    with each_row() as row:
        for typed, expected in COMPLETIONS.items():
            with row(typed):
                assert completions(show, typed) == expected
    offered = {each.rstrip("=.") for each in completions(show, "optimizer.")}
    assert offered == {f"optimizer.{each.name}" for each in fields(AdamConfig)}


def test_completions_of_a_word_compose(show: Shown) -> None:
    offered = completions(show, "optimizer.weight_decay_on=")
    assert offered
    for override in offered:
        composed = show("--cfg", "job", override)
        assert composed.returncode == 0, composed.output
        assert override.replace("optimizer.", "  ").replace("=", ": ") in composed.output


@pytest.mark.slow
def test_completions_for_bash_are_installed_and_work(app: Path) -> None:
    script = python(app, "-sc", "install=bash")
    assert script.returncode == 0, script.output
    succeed(["bash", "-n", "-c", script.output])
    typed = "scheduler.w"
    assert completions(functools.partial(python, app), typed) == COMPLETIONS[typed]


def defaults(kind: str, package: str, *, own_last: bool) -> str:
    """A defaults list in which a user's group and a preset have the same place."""
    place = f"{package}{kind}"
    own = f"  - {kind}@{place}: {'sgd' if kind == 'optimizer' else 'step'}"
    ours = [
        f"  - lightning_adam/optimizer@{package}optimizer: adamw",
        f"  - lightning_adam/scheduler@{package}scheduler: cosine",
    ]
    entries = [*ours, own] if own_last else [own, *ours]
    return "\n".join(["defaults:", *entries, "  - data: small", "  - _self_", ""])


def failed_merge(app: Path, show: Shown, defaults_list: str) -> Finished:
    (app / "conf" / "merged.yaml").write_text(defaults_list)
    failed = show("--config-name=merged")
    assert failed.returncode == 1
    assert "Traceback" not in failed.output
    return failed


def test_users_group_over_a_preset_is_an_error_of_the_composition(app: Path, show: Shown) -> None:
    with each_row() as row:
        for kind, package in itertools.product(MERGED, ["", "model."]):
            with row(f"{package}{kind}"):
                failed = failed_merge(app, show, defaults(kind, package, own_last=True))
                assert f"Key '_target_' not in '{MERGED[kind][1]}'" in failed.lines
                assert f"full_key: {package}{kind}._target_" in failed.lines


@pytest.mark.parametrize(("kind", "package"), [("optimizer", ""), ("scheduler", "model.")])
def test_users_group_under_a_preset_is_an_error_of_the_module(
    kind: str, package: str, app: Path, show: Shown
) -> None:
    failed = failed_merge(app, show, defaults(kind, package, own_last=False))
    target = MERGED[kind][0]
    (message,) = [line for line in failed.lines if f"{package}{kind}._target_={target} " in line]
    assert f"is merged with the fields of lightning_adam/{kind}, which do not belong" in message
    place = f"@{package}{kind}" if package else ""
    assert message.endswith(f"use lightning_adam/{kind}{place}=custom")


def test_invalid_value_is_an_error_with_a_suggestion(show: Shown) -> None:
    failed = show("optimizer.lr=-1")
    assert failed.returncode == 1
    assert "optimizer.lr=-1.0 must be above 0. Use for example optimizer.lr=0.001" in failed.lines
    assert "Traceback" not in failed.output


@functools.cache
def explained(topic: str) -> str:
    shown = printed(lambda: cli.main(["explain", topic]))
    assert shown.returncode == 0, shown.output
    return shown.output


def entries(explanation: str) -> dict[str, str]:
    """The explanation of each field, by its place and name, its lines joined."""
    blocks = re.findall(r"^  ([\w.]+)=.*\n((?: {6}.*\n?)+)", explanation, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in blocks}


def test_every_field_is_explained_with_a_default_and_a_source() -> None:
    with each_row() as row:
        for topic in TOPICS:
            explanations = entries(explained(topic))
            assert explanations, topic
            for name, text in explanations.items():
                with row(name):
                    end = re.sub(r".*\((?=default|required)", "", text)
                    default, _, source = end.partition("; ")
                    assert default.startswith("default: ") or default == "required"
                    assert re.fullmatch(r".+\)\.", source)


def test_explained_defaults_are_those_of_the_configs() -> None:
    everything = "\n".join(map(explained, TOPICS))
    headings = re.findall(r"^  ([\w.]+)=(.*)$", everything, re.MULTILINE)
    blocks = re.findall(r"^  [\w.]+=.*\n((?: {6}.*\n?)+)", everything, re.MULTILINE)
    read = OverridesParser.create().parse_override
    with each_row() as row:
        for (name, default), block in zip(headings, blocks, strict=True):
            stated = re.search(r"\(default: (\[.*?\]|[^\s,;)]+)", " ".join(block.split()))
            if stated and name not in DEFAULTS_IN_WORDS:
                with row(name):
                    assert read(f"a={stated[1]}").value() == read(f"a={default}").value()


DEFAULTS_IN_WORDS = {
    "optimizer.no_decay",
    "optimizer.layer_decay",
    "scheduler.name",
    "hydra.sweeper.study_name",
    "hydra.sweeper.space",
    *(f"hydra.sweeper.space.{each.name}" for each in fields(SpaceConfig) if each.name != "amsgrad"),
}


def test_every_field_of_every_config_is_explained() -> None:
    with each_row() as row:
        for name, config in CONFIGS.items():
            with row(name):
                topic, place = TOPIC_AND_PLACE.get(name, ("scheduler", "scheduler"))
                explanations = entries(explained(topic))
                expected = {f"{place}.{field}" for field in introduced(config)}
                assert expected <= explanations.keys()


TOPIC_AND_PLACE = {
    "AdamConfig": ("optimizer", "optimizer"),
    "CustomOptimizerConfig": ("optimizer", "optimizer"),
    "GroupConfig": ("optimizer", "optimizer.groups.0"),
    "LayerDecayConfig": ("optimizer", "optimizer.layer_decay"),
    "MonitorConfig": ("monitor", "adam_monitor"),
    "SpaceConfig": ("tune", "hydra.sweeper.space"),
    "TuneConfig": ("tune", "hydra.sweeper"),
}
"""Where the fields of a dataclass are explained, and what stands before their names."""


def introduced(config: type) -> set[str]:
    """The fields that a dataclass does not have from its bases."""
    inherited = {name for base in config.__bases__ if is_dataclass(base) for name in names(base)}
    return names(config) - inherited


def names(config: Any) -> set[str]:
    """The fields that can be set."""
    return {field.name for field in fields(config) if field.init}


def test_explained_fields_are_overrides_with_their_defaults(show: Shown) -> None:
    everything = "\n".join(map(explained, TOPICS))
    overrides = re.findall(r"^  ((?:optimizer|adam_monitor)\.\w+=.*)$", everything, re.MULTILINE)
    assert len(overrides) == len(fields(AdamConfig)) + len(fields(MonitorConfig))
    adam = "lightning_adam/optimizer=adam"
    overridden, plain = (show("--cfg", "job", adam, *each) for each in (overrides, []))
    assert (overridden.returncode, overridden.output) == (0, plain.output)


def test_command_shows_its_help_and_version() -> None:
    assert "explain" in printed(lambda: cli.main(["--help"])).output
    assert printed(lambda: cli.main(["--version"])).output.strip() == __version__


def test_statistics_and_histograms_are_explained() -> None:
    expected = {
        "statistics": [statistic.key for statistic in STATISTICS.values()],
        "decay_*": ["adam_weight_decay/decay_lost_fraction", "[headline,decay_lost_fraction]"],
        "histograms": [f"adam_histogram/{quantity}" for quantity in QUANTITIES],
    }
    for topic, parts in expected.items():
        assert [part for part in parts if part not in explained(topic)] == []


def test_unknown_topic_is_an_error_with_the_choices() -> None:
    failed = printed(lambda: cli.main(["explain", "betas"]))
    assert failed.returncode == 2
    (message,) = [line for line in failed.lines if "betas" in line]
    assert all(topic in message for topic in ("optimizer", "scheduler", "monitor"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "returncode", "printed"),
    [
        ("""'optimizer.groups=[{name: "é ☃", match: net.*}]'""", 0, "- name: é ☃"),
        ("optimizer.betas=[0.9,0.99", 1, "no viable alternative at input"),
    ],
)
def test_override_line_in_a_shell(app: Path, line: str, returncode: int, printed: str) -> None:
    finished = run_text(f"python app.py --cfg job {line}", app, cold=True)
    assert finished.returncode == returncode
    assert printed in finished.output
    assert "Traceback" not in finished.output


@pytest.fixture(scope="module")
def hydra_1_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which Python finds Hydra 1.4, and omegaconf 2.4, before all else."""
    folder = tmp_path_factory.mktemp("hydra_1_4")
    pip: Command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
    succeed([*pip, HYDRA_1_4])
    return {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "always"}


@pytest.fixture(scope="module")
def sweep(app: Path, hydra_1_4: dict[str, str]) -> Finished:
    """A sweep of two jobs under Hydra 1.4, the second with a value out of range."""
    return python(app, "-m", "optimizer.lr=0.1,-1", **hydra_1_4)


@pytest.mark.slow
def test_app_trains_under_hydra_1_4_without_a_warning_about_the_package(sweep: Finished) -> None:
    assert sweep.after(TRAINED) == "AdamW 2"
    assert sweep.after("hydra: ") == HYDRA_1_4.rpartition("=")[2]
    warned = re.findall(r"^(.+?):\d+: (.*)$", sweep.output, re.MULTILINE)
    assert warned
    for place, message in warned:
        assert not re.search(r"lightning_adam/[\w/]+\.py$", place), message
        assert not any(name in message for name in ("lightning_adam", "ConfigStore", "entry point"))


@pytest.mark.slow
def test_invalid_value_is_an_error_under_hydra_1_4(sweep: Finished) -> None:
    assert sweep.returncode == 1
    message = "optimizer.lr=-1.0 must be above 0. Use for example optimizer.lr=0.001"
    assert message in sweep.lines[-1]


@pytest.mark.slow
def test_composition_and_custom_classes_work_under_hydra_1_4(hydra_1_4: dict[str, str]) -> None:
    command: Command = [BIN / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ["tests/config", "tests/optim/test_optimizers.py"]
    chosen = ["-k", "composition or custom or error"]
    variables = environment(BIN, **hydra_1_4)
    finished = run([*command, *files, *chosen], REPOSITORY, variables, cold=True)
    assert finished.returncode == 0, finished.output
