"""Adam of other libraries: the statistics match their state and the guide's table."""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_adam import AdamMonitor, AdamStatistics, build_optimizer
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS
from tests.support import commands, oracle, training
from tests.support.agreement import bare
from tests.support.reported import Fit, fit, not_measured
from tests.support.training import assert_same_parameters, parameters, run_training

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guides" / "other_optimizers.md").read_text(encoding="utf-8")
DISTRIBUTIONS = {"optimi": "torch-optimi"}
"""Distribution names that differ from the package's."""
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}
COLUMNS = {
    "gradient": ["grad_norm", "grad_rms", "grad_max", "grad_zero_fraction", "nonfinite_count"],
    "`exp_avg`": ["exp_avg_rms", "exp_avg_mean", "exp_avg_max"],
    "`exp_avg_sq`": ["exp_avg_sq_mean", "exp_avg_sq_max"],
    "its rounding": ["exp_avg_sq_subnormal_fraction", "exp_avg_sq_stalled_fraction"],
}
SETTINGS = {"lr", "beta1", "beta2", "eps", "weight_decay", "step", "skipped_steps"}
OF_TRAINER = {"loss_scale", "grad_norm_before_clip", "clip_coefficient"}
"""Columns that a Trainer with clipping or scaling adds for any optimizer."""
NOT_ON_THE_CPU = ("no", "none", "with Triton")
BATCHES, SIZE = 5, 64
PRESETS = """
defaults:
  - lightning_adam/optimizer: custom
  - lightning_adam/scheduler: cosine
  - _self_
"""


class Row(NamedTuple):
    """A row of the guide's table."""

    target: str
    arguments: list[str]
    precision: str
    measured: set[str]

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]

    @property
    def id(self) -> str:
        return "-".join([self.target, *self.arguments, self.precision])


def rows_of_guide() -> list[Row]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    header, _, *cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = []
    for each in cells:
        row = dict(zip(header, each, strict=True))
        measured = [names for column, names in COLUMNS.items() if row[column] not in NOT_ON_THE_CPU]
        rows.append(
            Row(
                target=row["`optimizer._target_=`"].strip("`"),
                arguments=row["beside it"].strip("`").split(),
                precision=PRECISIONS[row["parameters"]],
                measured={name for names in measured for name in names},
            )
        )
    return rows


ROWS = rows_of_guide()
DEFAULT_ROWS = {
    "optimi.AdamW-bf16-true",
    "torchao.optim.AdamW8bit-32-true",
    "bitsandbytes.optim.AdamW8bit-32-true",
    "schedulefree.AdamWScheduleFree-+optimizer.warmup_steps=4-32-true",
}
"""A row of each library. The others are slow tests."""
assert {row.id for row in ROWS} >= DEFAULT_ROWS


# torchao compiles its step, which takes seconds for each shape.
uncompiled = partial(torch.compiler.set_stance, "force_eager")


class Lit(training.Lit):
    """Regression with a matrix large enough to be quantised. Keeps the values at each step."""

    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        matrix = nn.Linear(SIZE, SIZE)
        self.net = nn.Sequential(matrix, nn.LayerNorm(SIZE), nn.Tanh(), nn.Linear(SIZE, 1))
        self.grads: dict[Tensor, Tensor] = {}
        self.lrs: list[float] = []
        self.weights: dict[Tensor, Tensor] = {}

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.grads = {
            each: each.grad.clone() for each in self.parameters() if each.grad is not None
        }
        self.lrs = [float(group["lr"]) for group in optimizer.param_groups]

    @override
    def on_train_batch_end(self, *arguments: Any) -> None:
        self.weights = {each: each.detach().clone() for each in self.parameters()}


def loader() -> DataLoader[tuple[Tensor, ...]]:
    inputs = torch.randn(8 * BATCHES, SIZE, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(inputs, inputs[:, :1].sin()), batch_size=8)


def from_guide(name: str) -> Any:
    """Returns a class that the guide defines."""
    (block,) = (each for each in PAGE.split("```python\n")[1:] if f"class {name}" in each)
    names: dict[str, Any] = {"LitClassifier": Lit}
    exec(block.partition("```")[0], names)
    return names[name]


def lit_for(optimizer: Any) -> type[Lit]:
    return from_guide("LitScheduleFree") if "schedulefree" in optimizer["_target_"] else Lit


def train(
    optimizer: Any, scheduler: Any = None, monitor: AdamMonitor | None = None, **flags: Any
) -> Fit:
    plugins = [from_guide("CheckpointOnCpu")()] if "torchao" in optimizer["_target_"] else []
    module = lit_for(optimizer)(optimizer, scheduler)
    torch.manual_seed(5)
    with uncompiled():
        return fit(module, monitor, plugins=plugins, data=loader(), **flags)


def monitored(optimizer: Any, scheduler: Any = None, **flags: Any) -> Fit:
    return train(optimizer, scheduler, AdamMonitor(1, ["model", "group"], "all"), **flags)


def moment(state: Any, name: str) -> Tensor | None:
    """Returns a moment, dequantised by the library itself."""
    number = {"exp_avg": 1, "exp_avg_sq": 2}[name]
    kept = state.get(name, state.get(f"state{number}"))
    if f"qmap{number}" in state:
        functional = import_module("bitsandbytes.functional")
        quantised = {"absmax": state[f"absmax{number}"], "code": state[f"qmap{number}"]}
        kept = functional.dequantize_blockwise(kept, **quantised, blocksize=256)
    elif hasattr(kept, "codes"):
        kept = kept.dequantize()
    assert kept is None or isinstance(kept, Tensor)
    return kept


def reference_tensors(ended: Fit) -> list[oracle.Tensor]:
    """Returns the tensors for the oracle, with zeros for a moment that does not exist."""
    tensors = []
    (optimizer,) = ended.optimizers
    module: Any = ended.run.module
    for group, lr in zip(optimizer.param_groups, module.lrs, strict=True):
        beta1, beta2 = (group.get("betas") or (group["beta1"], group["beta2"]))[:2]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            first, second = (moment(state, name) for name in ("exp_avg", "exp_avg_sq"))
            nothing = torch.zeros_like(parameter)
            tensors.append(
                oracle.Tensor(
                    parameter=module.weights[parameter],
                    grad=module.grads[parameter],
                    exp_avg=nothing if first is None else first,
                    exp_avg_sq=nothing if second is None else second,
                    max_exp_avg_sq=None,
                    step=BATCHES,
                    lr=group.get("scheduled_lr", lr),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group.get("eps", 0.0),
                    weight_decay=group["weight_decay"],
                    amsgrad=False,
                    maximize=False,
                    decoupled=False,
                )
            )
    return tensors


def composed(row: Row, folder: Path) -> Any:
    """Returns the config as composed from the row's overrides."""
    (folder / "config.yaml").write_text(PRESETS, encoding="utf-8")
    overrides = [f"optimizer._target_={row.target}", "optimizer.lr=1e-2", *row.arguments]
    if row.package == "schedulefree":
        overrides.append("lightning_adam/scheduler=constant")
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("config", overrides=overrides)


@pytest.mark.filterwarnings("ignore:.*foreach.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.id, marks=[] if row.id in DEFAULT_ROWS else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_statistics_match_the_reference_and_the_table_of_the_guide(
    row: Row, tmp_path: Path
) -> None:
    pytest.importorskip(row.package)
    cfg = composed(row, tmp_path)
    watched = monitored(cfg.optimizer, cfg.scheduler, precision=row.precision)
    measured, tensors = bare(watched.values, ""), reference_tensors(watched)
    assert measured.keys() - SETTINGS == row.measured | {"weight_norm", "weight_rms"}
    expected = oracle.reference_statistics(tensors) | {"skipped_steps": 0.0}
    scale = oracle.signed_sum_scale(tensors)
    for name, value in measured.items():
        tolerance = 1e-6 * scale.get(name, 0.0)
        assert value == pytest.approx(expected[name], rel=1e-5, abs=tolerance), name
    (line,) = watched.lines + watched.warnings
    assert not_measured(line) >= {*STATISTICS} - measured.keys() - SETTINGS - OF_TRAINER
    assert not_measured(line).isdisjoint(measured)
    without = train(cfg.optimizer, cfg.scheduler, precision=row.precision)
    assert_same_parameters(watched.run.module, without.run.module)


def test_guide_names_the_tested_versions() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in {row.package for row in ROWS}:
        distribution = DISTRIBUTIONS.get(package, package)
        (version,) = (
            line.partition("==")[2].partition(";")[0]
            for line in pinned.splitlines()
            if line.startswith(f"{distribution}==")
        )
        assert f"{distribution} {version}" in " ".join(PAGE.split())


def test_guide_names_the_statistics_of_its_columns() -> None:
    explained = dict(item.partition(":")[::2] for item in PAGE.split("\n- ")[1:])
    for column, names in COLUMNS.items():
        text = explained[f"**{column}**"]
        assert [name for name in STATISTICS if f"`{name}`" in text] == [
            name for name in STATISTICS if name in names
        ]


OPTIMI = {"_target_": "optimi.AdamW", "lr": 1e-2, "weight_decay": 0.1}
TORCHAO = {"_target_": "torchao.optim.AdamW8bit", "lr": 1e-2, "weight_decay": 0.1}
SCHEDULEFREE = {"_target_": "schedulefree.AdamWScheduleFree", "lr": 1e-2, "weight_decay": 0.1}
BITSANDBYTES = {"_target_": "bitsandbytes.optim.AdamW8bit", "lr": 1e-2, "weight_decay": 0.1}
LINEAR = {"name": "linear", "total_steps": 20, "warmup_steps": 2}


def require(optimizer: dict[str, Any]) -> None:
    pytest.importorskip(optimizer["_target_"].partition(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["checkpoint", "config"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(OPTIMI, LINEAR), (TORCHAO, LINEAR), (BITSANDBYTES, LINEAR), (SCHEDULEFREE, None)],
    ids=["optimi", "torchao", "bitsandbytes", "schedulefree"],
)
def test_resumed_run_equals_the_uninterrupted_one(
    optimizer: dict[str, Any], scheduler: Any, precision: str, resume: str
) -> None:
    require(optimizer)
    first = train(optimizer, scheduler, precision=precision)
    first.run.trainer.save_checkpoint("first.ckpt")
    flags = {"max_epochs": 2, "precision": precision}
    uninterrupted = monitored(optimizer, scheduler, **flags)
    again = {**optimizer, "resume": resume}
    resumed = monitored(again, scheduler, ckpt_path="first.ckpt", **flags)
    tolerance = 0.0
    if optimizer is SCHEDULEFREE:
        # The checkpoint has the averaged weights, and the others are recomputed from them.
        tolerance = 1e-6 if precision == "32-true" else 1e-2
    before, one, other = (parameters(each.run.module) for each in (first, resumed, uninterrupted))
    assert not all(map(torch.equal, before, other))
    assert all(map(partial(torch.allclose, rtol=0, atol=tolerance), one, other))
    values = uninterrupted.values.items()
    expected = {key: value for key, value in values if not key.endswith("skipped_steps")}
    tolerance = 0.05 if optimizer is SCHEDULEFREE else 1e-6
    actual = {key: resumed.values[key] for key in expected}
    assert actual == pytest.approx(expected, rel=tolerance)


def test_groups_layer_decay_and_schedule_apply_to_any_optimizer() -> None:
    require(OPTIMI)
    head = [{"name": "head", "match": "net.3.*", "lr_scale": 10, "eps": 1e-4}]
    config = {
        **OPTIMI,
        "weight_decay_on": "matrices",
        "groups": head,
        "layer_decay": {"pattern": "net.*", "rate": 0.5},
    }
    watched = monitored(config, LINEAR)
    groups = {group["name"]: group for group in watched.optimizers[0].param_groups}
    share = watched.values["adam_schedule/group/layer_0/lr"] / (1e-2 * 0.5**3)
    assert watched.values["adam_schedule/group/head_layer_3/lr"] == pytest.approx(share * 0.1 * 0.5)
    assert groups["head_layer_3"]["eps"] == 1e-4
    assert groups["layer_1_no_decay"]["weight_decay"] == 0


@pytest.mark.parametrize("optimizer", [TORCHAO, BITSANDBYTES], ids=lambda each: each["_target_"])
def test_few_elements_are_dequantised_at_a_time(
    optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    require(optimizer)
    sizes, measure = list[int](), kernels.measure

    def counted(states: Sequence[Any], *arguments: Any) -> Tensor:
        sizes.append(len(states))
        return measure(states, *arguments)  # type: ignore[arg-type]

    ended, metric = train(optimizer), AdamStatistics("all")
    module: Any = ended.run.module
    for parameter, grad in module.grads.items():
        parameter.grad = grad
    at_once = metric(ended.optimizers[0])
    assert at_once["adam_moments/exp_avg_rms"] > 0
    monkeypatch.setattr(kernels, "measure", counted)
    # A matrix, its bias, a norm's two vectors, a matrix of one row and its bias.
    monkeypatch.setattr("lightning_adam.statistics.param_states.MAX_DEQUANTIZED", 3 * SIZE)
    assert metric(ended.optimizers[0]) == at_once
    assert sum(sizes) == 6
    assert len(sizes) == 3


def test_sharded_quantised_state_is_measured(tmp_path: Path) -> None:
    require(TORCHAO)
    measured = []
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for is_sharded in (False, True):
            torch.manual_seed(1)
            net = nn.Linear(SIZE, SIZE)
            if is_sharded:
                fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
            optimizer = build_optimizer(net, TORCHAO)
            # The other kernels would crash if they misread the tensor.
            metric = AdamStatistics("all", kernel="eager")
            with uncompiled():
                net(torch.ones(SIZE)).square().sum().backward()
                optimizer.step()
            measured.append(metric(optimizer))
    finally:
        dist.destroy_process_group()
    assert measured[0]["adam_moments/exp_avg_rms"] > 0
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)


class WithoutMemory(Tensor):
    """A tensor without its own memory, like the quantised tensors of libraries."""

    @staticmethod
    def __new__(cls, shape: Sequence[int]) -> "WithoutMemory":
        make: Any = Tensor._make_wrapper_subclass
        tensor: WithoutMemory = make(cls, shape, dtype=torch.float32)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any) -> Any:
        raise NotImplementedError


def test_state_without_memory_is_skipped() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.NAdam(weights)
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[weights[0]]["exp_avg"] = WithoutMemory((3,))
    # The other kernels would crash when they access its elements.
    metric = AdamStatistics("all", kernel="eager")
    assert metric(optimizer)["adam_gradient/grad_norm"] == pytest.approx(3**0.5)
    assert metric.skipped == ["group_0.0"]


def test_schedulefree_validates_and_saves_the_averaged_weights(tmp_path: Path) -> None:
    require(SCHEDULEFREE)
    validated, averaged = list[Tensor](), list[Tensor]()

    class Validated(lit_for(SCHEDULEFREE)):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            (optimizer,) = self.trainer.optimizers
            weight = self.net[0].weight
            assert not optimizer.param_groups[0]["train_mode"]
            assert not self.net.training
            validated.append(weight.detach().clone())

        def on_validation_model_eval(self) -> None:
            (optimizer,) = self.trainer.optimizers
            weight = self.net[0].weight
            if weight in optimizer.state:
                # y = (1-β1)z + β1x
                z = optimizer.state[weight]["z"]
                averaged.append((weight.detach() - 0.1 * z) / 0.9)
            super().on_validation_model_eval()

    module = Validated(SCHEDULEFREE)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    flags: dict[str, Any] = {"data": loader(), "validation": loader(), "enable_checkpointing": True}
    run_training(module, keep, AdamMonitor(1), max_epochs=2, **flags)
    name = "net.0.weight"
    assert torch.allclose(validated[-1], averaged[-1], atol=1e-6)
    assert torch.allclose(module.state_dict()[name], averaged[-1], atol=1e-6)
    saved = torch.load(keep.best_model_path, weights_only=False)
    assert torch.allclose(saved["state_dict"][name], averaged[-1], atol=1e-6)


class TakesGradients(Optimizer):
    """Like heavyball: removes gradients in the step, and sets the count to None between steps."""

    consume_grad = True

    def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = None
            for parameter in group["params"]:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad * group["lr"])
                parameter.grad = None
        return loss


def test_step_that_removes_gradients_is_not_a_skipped_step() -> None:
    config = {"_target_": f"{__name__}.TakesGradients", "lr": 1e-2}
    watched = monitored(config, LINEAR)
    (line,) = watched.lines + watched.warnings
    assert line.startswith("AdamMonitor measures nothing of TakesGradients: all parameters are")
    # After the fifth of twenty steps, two of which warm up.
    assert watched.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 15 / 18)
    watched.run.trainer.save_checkpoint("first.ckpt")
    resumed = monitored(config, LINEAR, ckpt_path="first.ckpt", max_epochs=2)
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 10 / 18)


@pytest.mark.slow
def test_optional_libraries_are_not_imported_for_the_adam_of_torch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = (
        "import sys, torch",
        "from lightning_adam import AdamMixin, AdamMonitor, AdamStatistics, build_optimizer",
        "weight = torch.zeros(2, requires_grad=True)",
        "adam = torch.optim.AdamW([weight])",
        "weight.grad = torch.ones(2)",
        "adam.step()",
        "assert AdamStatistics()(adam)",
        'assert "lightning_adam.monitor.loggers" in sys.modules',
        'optional = {"optimi", "torchao", "schedulefree", "bitsandbytes", "wandb"}',
        "assert not optional & {*sys.modules}",
    )
    script.write_text("\n".join(lines), encoding="utf-8")
    commands.succeed([sys.executable, script], tmp_path)
