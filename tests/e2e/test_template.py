"""A project in the layout of lightning-hydra-template, with its own nodes and with the presets."""

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from torch import Tensor, nn

from tests.support.commands import BIN, run, write_files
from tests.support.template_project import BATCH_SIZE, BATCHES, EPOCHS, FILES, PRINTED

pytestmark = pytest.mark.slow

MATRICES = {"net.body.0.weight", "net.head.weight"}
ALL = {f"net.{name}.{kind}" for name in ("body.0", "body.1", "head") for kind in ("weight", "bias")}
OF_HEAD = {"net.head.weight", "net.head.bias"}
HEAD = '[{name: head, match: "*head*", lr_scale: 10}]'
FALLING = (
    "model.optimizer.lr=0.01",
    "model.scheduler.patience=0",
    "model.scheduler.factor=0.5",
    "+model.scheduler.threshold=0.99",
)
"""Only a loss that is a hundred times lower counts as an improvement."""
PLATEAU = {
    "class": "ReduceLROnPlateau",
    "monitor": "val/loss",
    "interval": "epoch",
    "frequency": 1,
}

Trained = dict[str, Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("template")
    write_files(folder, FILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_job_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")


def train(project: Path, *overrides: str) -> Trained:
    """Trains in the process of the tests, and returns the settings that the job used."""
    output = f"hydra.runtime.output_dir={Path.cwd()}"
    with initialize_config_dir(str(project / "configs"), version_base="1.3"):
        cfg = compose("train", [*overrides, output], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    trained: Trained = importlib.import_module("src.train").train(cfg)
    return trained


def train_grouped(project: Path, weight_decay_on: str, groups: str = "[]") -> Trained:
    """Trains with the template's own nodes and our keys beside theirs."""
    return train(
        project,
        "model.optimizer.weight_decay=0.1",
        f"+model.optimizer.weight_decay_on={weight_decay_on}",
        f"+model.optimizer.groups={groups}",
    )


def settings(trained: Trained, setting: str) -> dict[str, Any]:
    """One setting of each group."""
    return {name: group[setting] for name, group in trained["groups"].items()}


def names(trained: Trained) -> dict[str, set[str]]:
    """The parameters of each group."""
    return {name: set(group["names"]) for name, group in trained["groups"].items()}


def parameters_by_hand(project: Path, **of_vectors: float) -> list[float]:
    """torch alone, on the network and the data of the project; vectors may have settings."""
    net_file = project / "src/models/components/dense_net.py"
    data_file = project / "src/data/digits_datamodule.py"
    torch.manual_seed(0)
    net = runpy.run_path(str(net_file))["DenseNet"](6, 8, 2)
    data = runpy.run_path(str(data_file))["DigitsDataModule"](BATCHES * BATCH_SIZE, BATCH_SIZE)
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, **of_vectors}]
    adam = torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1)
    for _ in range(EPOCHS):
        for points, labels in data.train_dataloader():
            adam.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(net(points), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    parameters: list[float] = nn.utils.parameters_to_vector(net.parameters()).tolist()
    return parameters


def test_optimizer_and_plateau_of_the_template_are_trained_with(project: Path) -> None:
    trained = train_grouped(project, "matrices")
    assert trained["class"] == "Adam"
    assert names(trained) == {"decay": MATRICES, "no_decay": ALL - MATRICES}
    assert settings(trained, "lr") == {"decay": 1e-3, "no_decay": 1e-3}
    assert settings(trained, "weight_decay") == {"decay": 0.1, "no_decay": 0.0}
    assert trained["scheduler"] == PLATEAU
    assert trained["parameters"] == parameters_by_hand(project, weight_decay=0.0)


def test_weight_decay_on_and_groups_work_in_a_partial(project: Path) -> None:
    trained = train_grouped(project, "all")
    assert names(trained) == {"decay": ALL}
    assert settings(trained, "weight_decay") == {"decay": 0.1}
    assert trained["parameters"] == parameters_by_hand(project)
    assert names(train_grouped(project, "all", HEAD)) == {"decay": ALL - OF_HEAD, "head": OF_HEAD}
    trained = train_grouped(project, "matrices", HEAD)
    rates = {"decay": 1e-3, "no_decay": 1e-3, "head": 1e-2, "head_no_decay": 1e-2}
    assert settings(trained, "lr") == pytest.approx(rates)
    decays = {"decay": 0.1, "no_decay": 0.0, "head": 0.1, "head_no_decay": 0.0}
    assert settings(trained, "weight_decay") == decays


def test_overrides_are_used_and_the_plateau_lowers_the_lr(project: Path) -> None:
    trained = train(project, *FALLING)
    # The first validation is the best so far. Each later one halves the learning rate.
    rate = 0.01 * 0.5 ** (EPOCHS - 1)
    assert settings(trained, "lr") == {"decay": rate}
    assert trained["scheduler"] == PLATEAU


def test_presets_replace_the_nodes_of_the_template(project: Path) -> None:
    trained = train(project, "experiment=presets")
    assert trained["class"] == "AdamW"
    assert settings(trained, "peak") == {"decay": 2e-3, "no_decay": 2e-3}
    assert settings(trained, "lr") == {"decay": 0.0, "no_decay": 0.0}
    assert settings(trained, "weight_decay") == {"decay": 0.01, "no_decay": 0.0}
    assert trained["scheduler"]["interval"] == "step"
    assert "adam_gradient/grad_norm" in trained["metrics"]


def test_scheduler_of_epochs_is_stepped_after_each_epoch(project: Path) -> None:
    trained = train(project, "experiment=step")
    assert (trained["class"], trained["scheduler"]["class"]) == ("AdamW", "StepLR")
    assert trained["scheduler"]["interval"] == "epoch"
    assert settings(trained, "lr")["decay"] == 1e-3 * 0.5**EPOCHS


def test_scheduler_of_total_steps_is_stepped_after_each_step(project: Path) -> None:
    trained = train(project, "experiment=annealing")
    assert (trained["class"], trained["scheduler"]["class"]) == ("NAdam", "CosineAnnealingLR")
    assert trained["scheduler"]["interval"] == "step"
    assert settings(trained, "peak")["decay"] == 1e-3
    assert settings(trained, "lr")["decay"] == 0.0


def test_preset_merged_with_a_node_of_the_template_is_an_error(project: Path) -> None:
    expected = (
        r"^model\.optimizer\._target_=torch\.optim\.Adam is merged with the fields of"
        r" lightning_adam/optimizer, .* use lightning_adam/optimizer@model\.optimizer=custom$"
    )
    with pytest.raises(HydraException, match=expected):
        train(project, "experiment=merged")


def test_unknown_keyword_is_an_error_of_one_line_of_the_command(project: Path) -> None:
    failed = run([BIN / "python", "-m", "src.train", "+model.optimizer.beta=0.9"], project)
    assert failed.returncode == 1
    (sentence,) = [line for line in failed.lines if "optimizer.beta=" in line[:30]]
    assert sentence == (
        "model.optimizer.beta=0.9 is not a setting. Use for example +model.optimizer.betas=0.9"
    )
    for harm in ("Traceback", PRINTED):
        assert harm not in failed.output
