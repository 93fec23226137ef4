"""An app of a user's own: what Hydra shows, completes and refuses in it; and `explain`."""

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lightning_adam import __version__, schema
from lightning_adam.explaining import TOPICS
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.support.commands import (
    BIN,
    REPOSITORY,
    Command,
    Finished,
    environment,
    run,
    succeed,
    write_files,
)

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
OURS = {
    "lightning_adam/monitor": ["default"],
    "lightning_adam/optimizer": ["adam", "adamw", "custom"],
    "lightning_adam/scheduler": sorted(schema.SCHEDULERS),
    "lightning_adam/tune": ["default"],
}
MERGED = {
    "optimizer": ("torch.optim.SGD", "AdamConfig"),
    "scheduler": ("torch.optim.lr_scheduler.StepLR", "CosineConfig"),
}
"""What is merged with which of our types."""
SCHEMAS: dict[str, type] = {
    name: each
    for name, each in vars(schema).items()
    if is_dataclass(each) and isinstance(each, type)
}
HYDRA_1_4 = "hydra-core==1.4.0rc3"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    write_files(folder, FILES)
    return folder


def python(app: Path, *arguments: str, **variables: str) -> Finished:
    return run([BIN / "python", "app.py", *arguments], app, environment(BIN, **variables))


def test_help_lists_our_presets_beside_the_users_own_groups_and_no_schemas(app: Path) -> None:
    shown = python(app, "--help")
    assert shown.returncode == 0, shown.output
    groups = dict(re.findall(r"^([\w/]+): ([\w, ]+)$", shown.output, re.MULTILINE))
    ours = {name: options for name, options in groups.items() if name.startswith("lightning_adam")}
    assert {name: options.split(", ") for name, options in ours.items()} == OURS
    own = {"data": "large, small", "optimizer": "sgd", "scheduler": "step"}
    assert groups | own == groups
    assert "lightning_adam_" not in shown.output


def completions(app: Path, typed: str) -> list[str]:
    """What the tab key offers after what was typed."""
    line = f"python app.py {typed}"
    offered = python(app, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert offered.returncode == 0, offered.output
    return offered.output.split()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("lightning_adam/", [f"{group}=" for group in OURS]),
        (
            "lightning_adam/optimizer=",
            [f"lightning_adam/optimizer={option}" for option in ("adam", "adamw", "custom")],
        ),
        ("optimizer.b", ["optimizer.betas."]),
        ("scheduler.w", ["scheduler.warmup_ratio=", "scheduler.warmup_steps="]),
    ],
)
def test_the_tab_key_completes_groups_options_and_fields(
    app: Path, typed: str, expected: list[str]
) -> None:
    assert completions(app, typed) == expected


def test_the_tab_key_offers_every_field_of_the_optimizer(app: Path) -> None:
    offered = {each.rstrip("=.") for each in completions(app, "optimizer.")}
    assert offered == {f"optimizer.{each.name}" for each in fields(schema.AdamConfig)}


def test_what_the_tab_key_offers_for_a_word_composes(app: Path) -> None:
    offered = completions(app, "optimizer.weight_decay_on=")
    assert offered
    for override in offered:
        composed = python(app, "--cfg", "job", override)
        assert composed.returncode == 0, composed.output
        assert override.replace("optimizer.", "  ").replace("=", ": ") in composed.output


def test_the_completion_for_bash_can_be_installed(app: Path) -> None:
    script = python(app, "-sc", "install=bash")
    assert script.returncode == 0, script.output
    succeed(["bash", "-n", "-c", script.output])


def defaults(kind: str, package: str, *, own_last: bool) -> str:
    """A defaults list in which a user's own group and one of ours have the same place."""
    place = f"{package}{kind}"
    own = f"  - {kind}@{place}: {'sgd' if kind == 'optimizer' else 'step'}"
    ours = [
        f"  - lightning_adam/optimizer@{package}optimizer: adamw",
        f"  - lightning_adam/scheduler@{package}scheduler: cosine",
    ]
    entries = [*ours, own] if own_last else [own, *ours]
    return "\n".join(["defaults:", *entries, "  - data: small", "  - _self_", ""])


def refused_merge(app: Path, defaults_list: str) -> Finished:
    (app / "conf" / "merged.yaml").write_text(defaults_list)
    refused = python(app, "--config-name=merged")
    assert refused.returncode == 1
    assert "Traceback" not in refused.output
    return refused


@pytest.mark.parametrize("package", ["", "model."], ids=["default place", "relocated"])
@pytest.mark.parametrize("kind", MERGED)
def test_a_group_of_the_users_own_over_ours_is_refused_when_composed(
    app: Path, kind: str, package: str
) -> None:
    refused = refused_merge(app, defaults(kind, package, own_last=True))
    assert f"Key '_target_' not in '{MERGED[kind][1]}'" in refused.lines
    assert f"full_key: {package}{kind}._target_" in refused.lines


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "package"), [("optimizer", ""), ("scheduler", "model.")])
def test_a_group_of_the_users_own_under_ours_is_refused_by_name(
    app: Path, kind: str, package: str
) -> None:
    refused = refused_merge(app, defaults(kind, package, own_last=False))
    assert_refused_by_name(refused, kind, package)


def assert_refused_by_name(refused: Finished, kind: str, package: str) -> None:
    target = MERGED[kind][0]
    (sentence,) = [line for line in refused.lines if f"{package}{kind}._target_={target}: " in line]
    assert f"expected the fields of lightning_adam/{kind} alone" in sentence
    assert f"lightning_adam/{kind}=custom" in sentence


def explained(topic: str) -> str:
    return succeed([BIN / "lightning-adam", "explain", topic])


def entries(explanation: str) -> dict[str, str]:
    """What is said of each field, by its place and name, its lines joined."""
    blocks = re.findall(r"^  ([\w.]+)=.*\n((?: {6}.*\n?)+)", explanation, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in blocks}


@pytest.mark.parametrize("topic", TOPICS)
def test_every_field_is_explained_with_a_default_and_a_source(topic: str) -> None:
    explanation = explained(topic)
    said = entries(explanation)
    assert said
    for name, text in said.items():
        default, _, source = re.sub(r".*\((?=default|no default)", "", text).partition("; ")
        assert default.startswith(("default: ", "no default")), name
        assert re.fullmatch(r".+\)\.", source), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_field_of_a_config_is_left_unexplained(name: str) -> None:
    topic, place = TOPIC_AND_PLACE.get(name, ("scheduler", "scheduler"))
    said = entries(explained(topic))
    assert {f"{place}.{field}" for field in introduced(SCHEMAS[name])} <= said.keys()


TOPIC_AND_PLACE = {
    "AdamConfig": ("optimizer", "optimizer"),
    "GroupConfig": ("optimizer", "optimizer.groups.0"),
    "LayerDecayConfig": ("optimizer", "optimizer.layer_decay"),
    "MonitorConfig": ("monitor", "adam_monitor"),
    "StageConfig": ("tune", "hydra.sweeper.stages.lr"),
    "TuneConfig": ("tune", "hydra.sweeper"),
}
"""Where the fields of a dataclass are explained, and what stands before their names."""


def introduced(config: type) -> set[str]:
    """The fields that a dataclass does not have from its bases."""
    inherited = {name for base in config.__bases__ if is_dataclass(base) for name in names(base)}
    return names(config) - inherited


def names(config: Any) -> set[str]:
    return {field.name for field in fields(config)}


def test_what_is_explained_can_be_typed(app: Path) -> None:
    shown = re.findall(r"^  ((?:optimizer|adam_monitor)\.\w+=.*)$", everything(), re.MULTILINE)
    assert len(shown) == len(fields(schema.AdamConfig)) + len(fields(schema.MonitorConfig))
    adam = "lightning_adam/optimizer=adam"
    typed, untyped = (python(app, "--cfg", "job", adam, *each) for each in (shown, []))
    assert (typed.returncode, typed.output) == (0, untyped.output)


def everything() -> str:
    return "\n".join(map(explained, TOPICS))


def test_the_command_says_what_it_can_do_and_which_version_it_is() -> None:
    assert "explain" in succeed([BIN / "lightning-adam", "--help"])
    assert succeed([BIN / "lightning-adam", "--version"]).strip() == __version__


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("statistics", [statistic.key for statistic in STATISTICS.values()]),
        ("decay_*", ["adam_weight_decay/decay_lost_fraction", "[headline,decay_lost_fraction]"]),
        ("histograms", [f"adam_histogram/{quantity}" for quantity in QUANTITIES]),
    ],
)
def test_what_is_measured_is_explained(topic: str, said: list[str]) -> None:
    explanation = explained(topic)
    assert all(words in explanation for words in said)


def test_an_unknown_topic_is_refused_with_the_choices() -> None:
    refused = run([BIN / "lightning-adam", "explain", "betas"])
    assert refused.returncode == 2
    (sentence,) = [line for line in refused.lines if "betas" in line]
    assert all(topic in sentence for topic in ("optimizer", "scheduler", "monitor"))


@pytest.fixture(scope="module")
def hydra_1_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which Python finds Hydra 1.4, and omegaconf 2.4, before all else."""
    folder = tmp_path_factory.mktemp("hydra_1_4")
    pip: Command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
    succeed([*pip, HYDRA_1_4])
    return {"PYTHONPATH": str(folder), "PYTHONWARNINGS": "always"}


@pytest.mark.slow
def test_the_app_trains_under_hydra_1_4_without_a_warning_about_us(
    app: Path, hydra_1_4: dict[str, str]
) -> None:
    trained = python(app, **hydra_1_4)
    assert trained.returncode == 0, trained.output
    assert trained.after(TRAINED) == "AdamW 2"
    assert trained.after("hydra: ") == HYDRA_1_4.rpartition("=")[2]
    assert_no_warning_about_us(trained)


def assert_no_warning_about_us(finished: Finished) -> None:
    warned = re.findall(r"^(.+?):\d+: (.*)$", finished.output, re.MULTILINE)
    assert warned
    for place, message in warned:
        assert not re.search(r"lightning_adam/[\w/]+\.py$", place), message
        assert not any(name in message for name in ("lightning_adam", "ConfigStore", "entry point"))


@pytest.mark.slow
def test_a_class_by_its_target_trains_under_hydra_1_4(app: Path, hydra_1_4: dict[str, str]) -> None:
    custom = ["lightning_adam/optimizer=custom", "optimizer._target_=torch.optim.NAdam"]
    trained = python(app, *custom, "optimizer.lr=0.1", **hydra_1_4)
    assert trained.after(TRAINED) == "NAdam 2"


@pytest.mark.slow
def test_a_value_out_of_range_is_refused_by_our_sentence_under_hydra_1_4(
    app: Path, hydra_1_4: dict[str, str]
) -> None:
    refused = python(app, "optimizer.lr=-1", **hydra_1_4)
    assert refused.returncode == 1
    sentence = "optimizer.lr=-1.0: expected a finite number above 0; type for example"
    assert sentence in refused.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("optimizer.lrr=1", "Key 'lrr' not in 'AdamConfig'"),
        ("optimizer.lr=fast", "Value 'fast' of type 'str' could not be converted to Float"),
        ("optimizer.betas=0.9", "float is not a ListConfig"),
        ("scheduler.warmup=3", "Key 'warmup' not in 'CosineConfig'"),
    ],
)
def test_a_typo_is_refused_when_composed_under_hydra_1_4(
    app: Path, hydra_1_4: dict[str, str], typed: str, expected: str
) -> None:
    refused = python(app, typed, **hydra_1_4)
    assert refused.returncode == 1
    assert sum(expected in line for line in refused.lines) == 1, refused.output
    assert "Traceback" not in refused.output


@pytest.mark.slow
def test_the_tests_of_composition_pass_under_hydra_1_4(hydra_1_4: dict[str, str]) -> None:
    command: Command = [BIN / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    finished = run([*command, "tests/hydra_plugin"], REPOSITORY, environment(BIN, **hydra_1_4))
    assert finished.returncode == 0, finished.output
