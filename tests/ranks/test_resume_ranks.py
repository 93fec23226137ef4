"""Resume on two ranks: unchanged, with another lr, longer, and in other groups."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lightning_adam import ConfigError, build_adam
from lightning_adam.statistics.names import clean_name
from tests.support.parallel import KINDS, loader
from tests.support.ranks import Ranks
from tests.support.tables import each_row
from tests.support.training import trainer

EPOCH = 3
"""Optimizer steps of an epoch."""
CONFIG: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}
COSINE = {"name": "cosine", "warmup_steps": 2}
HEAD = {"name": "head", "match": "*5.*", "lr_scale": 0.1}


class Case:
    """A change of the config for the resumed part of a run."""

    def __init__(self, epochs: int = 2, **changes: Any) -> None:
        self.epochs = epochs
        self.config = {**CONFIG, **changes}


CASES = {
    "first": Case(epochs=1),
    "same": Case(),
    "lr": Case(lr=3e-3),
    "longer": Case(epochs=4),
    "regrouped": Case(groups=[HEAD]),
}
ONE_FILE = "FSDP2 in one file"
RATES = {"decay": 1.0, "no_decay": 1.0, "head": 0.1, "head_no_decay": 0.1}
"""Scale of each group's learning rate."""


def factor(step: int, total: int) -> float:
    """Returns the factor of the schedule at a step."""
    if step < 2:
        return (step + 1) / 3
    return (1 + math.cos(math.pi * (step - 2) / (total - 2))) / 2


def local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def moments(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """This rank's part of the state, by the parameters' names."""
    return {
        clean_name(name): [local(value) for _, value in sorted(optimizer.state[parameter].items())]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if optimizer.state[parameter]
    }


class Recorder(L.Callback):
    """The state at the start, and the learning rates of each step."""

    def __init__(self) -> None:
        self.begun: dict[str, list[Tensor]] = {}
        self.rates: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = moments(trainer.optimizers[0])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


# Functions that the ranks run


def train(kind: str, way: str, name: str, path: str | None = None) -> dict[str, Any]:
    """Trains with Lightning, from a checkpoint if given; otherwise saves one."""
    case, is_one_file = CASES[name], kind == ONE_FILE
    kind = "FSDP2" if is_one_file else kind

    class Module(KINDS[kind].module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(case.config)
            self._arguments = self._configs = self._parse(case.config, COSINE)

        def on_fit_start(self) -> None:
            """Without super()."""

        def on_train_start(self) -> None:
            """Without super()."""

        if way == "build_adam":

            def configure_optimizers(self) -> Any:
                return build_adam(self, case.config, COSINE)

    module, recorder, strategy = Module(), Recorder(), KINDS[kind].strategy()
    if is_one_file:
        strategy._save_distributed_checkpoint = False  # type: ignore[attr-defined]
    fit = trainer(
        devices=2,
        strategy=strategy,
        callbacks=[recorder],
        max_epochs=case.epochs,
        use_distributed_sampler=False,
    )
    fit.fit(module, loader(kind), ckpt_path=path)
    if path is None:
        fit.save_checkpoint(f"{ONE_FILE if is_one_file else kind}.ckpt")
    (optimizer,) = fit.optimizers
    return describe_settings(optimizer, module, recorder.begun, recorder.rates)


def train_zero_redundancy(name: str, path: str | None = None) -> dict[str, Any]:
    """Trains with ZeroRedundancyOptimizer, where each rank has the state of some parameters."""
    case = CASES[name]
    config = {key: case.config[key] for key in ("lr", "weight_decay")}
    optimizer = functools.partial(
        ZeroRedundancyOptimizer, optimizer_class=AdamW, weight_decay_on="matrices", **config
    )
    if "groups" in case.config:
        optimizer = functools.partial(optimizer, groups=case.config["groups"])

    class Module(KINDS["DDP"].module):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return build_adam(self, optimizer, COSINE)

    module, fit = (
        Module(),
        trainer(
            devices=2,
            strategy=KINDS["DDP"].strategy(),
            max_epochs=case.epochs,
            use_distributed_sampler=False,
        ),
    )
    fit.fit(module, loader("DDP"), ckpt_path=path)
    if path is None:
        fit.save_checkpoint("zero.ckpt")
    (built,) = fit.optimizers
    return {group["name"]: group["initial_lr"] for group in built.param_groups} | {
        "parameters": [local(each) for each in module.parameters()]
    }


def error_of(name: str) -> str:
    try:
        train_zero_redundancy(name, "zero.ckpt")
    except ConfigError as error:
        return str(error)
    return ""


def train_fsdp1(way: str, name: str, path: str | None = None) -> dict[str, Any]:
    """Trains with FSDP1 in a plain loop, which saves only the optimizer and the schedule."""
    case = CASES[name]
    lit = KINDS["DDP"].module(case.config)
    settings: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    lit.net = FullyShardedDataParallel(lit.net, **settings)  # type: ignore[assignment]
    total = EPOCH * case.epochs
    schedule = {**COSINE, "total_steps": total}
    lit._arguments = lit._configs = lit._parse(case.config, schedule)
    built: Any = (
        lit.configure_optimizers() if way == "mixin" else build_adam(lit.net, case.config, schedule)
    )
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    if path is not None:
        saved = torch.load(f"{dist.get_rank()}{path}", weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    begun, rates = moments(optimizer), []
    batches = itertools.islice(itertools.cycle(loader("DDP")), total - EPOCH * (path is not None))
    for inputs, targets in batches:
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.mse_loss(lit.net(inputs), targets))
        optimizer.step()
        scheduler.step()
    if path is None:
        # Each rank saves its part, because torch 2.13 gathers wrong moments on the CPU.
        states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save(states, f"{dist.get_rank()}FSDP1.ckpt")
    return describe_settings(optimizer, lit, begun, rates)


def describe_settings(
    optimizer: Optimizer,
    module: nn.Module,
    begun: dict[str, list[Tensor]],
    rates: list[dict[str, float]],
) -> dict[str, Any]:
    settings = ("lr", "initial_lr", "weight_decay", "betas", "eps")
    return {
        "begun": begun,
        "ended": moments(optimizer),
        "rates": rates,
        "parameters": [local(each) for each in module.parameters()],
        "groups": {group["name"]: group["param_names"] for group in optimizer.param_groups},
        "settings": {
            group["name"]: [group[key] for key in settings] for group in optimizer.param_groups
        },
    }


# Tests


def run_kind(ranks: Ranks, kind: str, way: str, *arguments: Any) -> list[dict[str, Any]]:
    if kind == "FSDP1":
        return ranks.run(train_fsdp1, way, *arguments)
    return ranks.run(train, kind, way, *arguments)


@pytest.mark.parametrize("way", ["mixin", pytest.param("build_adam", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2", ONE_FILE, "FSDP1"])
def test_resumed_run_has_the_moments_groups_and_rates_of_its_config(
    kind: str, way: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The length of the run has no effect until the end of the warm-up.
    whole = run_kind(ranks, kind, way, "same")
    first = run_kind(ranks, kind, way, "first")
    with each_row() as row:
        for name in ("same", "lr", "longer", "regrouped"):
            with row(name):
                case = CASES[name]
                resumed = run_kind(ranks, kind, way, name, f"{kind}.ckpt")
                for before, after in zip(first, resumed, strict=True):
                    assert_same_state(before["ended"], after["begun"])
                    check_groups(case, after)
                    total = EPOCH * case.epochs
                    for step, seen in enumerate(after["rates"], EPOCH):
                        expected = {
                            group: case.config["lr"] * RATES[group] * factor(step, total)
                            for group in after["groups"]
                        }
                        assert seen == pytest.approx(expected, rel=1e-12)
                    assert len(after["rates"]) == total - EPOCH
                if name == "same" and kind != "FSDP1":
                    for one, other in zip(whole, resumed, strict=True):
                        assert_equal(one["parameters"], other["parameters"])


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def assert_same_state(saved: dict[str, list[Tensor]], loaded: dict[str, list[Tensor]]) -> None:
    assert saved.keys() == loaded.keys()
    for name, values in saved.items():
        for one, other in zip(values, loaded[name], strict=True):
            assert torch.equal(one, other), name


def check_groups(case: Case, after: dict[str, Any]) -> None:
    head = {each for each in after["groups"] if each.startswith("head")}
    assert head == ({"head", "head_no_decay"} if "groups" in case.config else set())
    for group, (_, peak, weight_decay, betas, eps) in after["settings"].items():
        assert peak == pytest.approx(case.config["lr"] * RATES[group], rel=1e-12)
        assert weight_decay == (0.0 if group.endswith("no_decay") else 0.1)
        assert (betas, eps) == ((0.9, 0.999), 1e-8)


def test_zero_redundancy_optimizer_resumes_in_its_groups(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = ranks.run(train_zero_redundancy, "same")
    ranks.run(train_zero_redundancy, "first")
    for one, other in zip(
        whole, ranks.run(train_zero_redundancy, "same", "zero.ckpt"), strict=True
    ):
        assert one["decay"] == other["decay"] == 1e-2
        assert_equal(one["parameters"], other["parameters"])
    for other in ranks.run(train_zero_redundancy, "lr", "zero.ckpt"):
        assert (other["decay"], other["no_decay"]) == (3e-3, 3e-3)
    for error in ranks.run(error_of, "regrouped"):
        assert "finds states by their position. Configure the groups of the checkpoint" in error
