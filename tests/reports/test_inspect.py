"""`lightning-adam inspect`: the statistics of a checkpoint agree with those of the run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import OmegaConf
from torch import nn

from lightning_adam import AdamStatistics, ConfigError
from lightning_adam.cli import main
from lightning_adam.config.monitor import Scope
from lightning_adam.config.optimizer import AdamConfig
from lightning_adam.reports.inspection.inspection import inspect
from lightning_adam.reports.inspection.measurements import (
    UNDERFLOWED,
    WEIGHT_COLUMNS,
    LastStep,
    in_dtype,
    measure,
    with_eps,
)
from lightning_adam.reports.inspection.run import run_of
from lightning_adam.reports.inspection.saved_optimizer import SavedOptimizer
from lightning_adam.reports.inspection.text import describe_inspection
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.columns import ACCUMULATORS, COLUMNS, sources_of
from lightning_adam.statistics.histograms import fold
from lightning_adam.statistics.param_states import ParamStates
from lightning_adam.statistics.state_reader import StateReader
from tests.statistics.cases import reference_tensors, stepped
from tests.support.monitored import TwoOptimizers
from tests.support.oracle import reference_statistics
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, loss_of, network, trainer

STEPS = 7
NEED_THE_GRADIENT = {
    *("grad_norm", "grad_rms", "grad_max", "grad_zero_fraction"),
    *("grad_norm_before_clip", "clip_coefficient"),
    *("grad_momentum_cosine", "exp_avg_carryover", "rms_ratio", "rms_ratio_max"),
    *("exp_avg_sq_zero_fraction", "decay_to_grad"),
}
GIVEN_AT_EACH_STEP = {"loss_scale", "skipped_steps"}


class Plain(L.LightningModule):
    """A module with an optimizer of torch and unnamed parameter groups."""

    def __init__(self, build: Callable[[nn.Sequential], Any]) -> None:
        super().__init__()
        self.net = network()
        self.build = build

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self.build(self.net)


def fit(module: L.LightningModule, path: Path, **settings: Any) -> AdamStatistics:
    """Trains, saves a checkpoint, and returns the statistics of the last step."""
    statistics = AdamStatistics("all", ["model", "group", "layer", "tensor"], module=module)

    def watch(training: L.Trainer, _: Any) -> None:
        optimizer = training.optimizers[0]
        optimizer.register_step_post_hook(lambda *_: statistics.update(optimizer, histograms=True))

    training = trainer(max_epochs=1, callbacks=[LambdaCallback(on_train_start=watch)], **settings)
    training.fit(module, loader(STEPS))
    training.save_checkpoint(path)
    return statistics


def inspected(path: Path) -> tuple[SavedOptimizer, LastStep]:
    inspection = inspect(path)
    (optimizer,) = inspection.optimizers
    assert not inspection.not_inspected
    return optimizer.saved, optimizer.last_step


def inspection_text(path: Path) -> str:
    return describe_inspection(inspect(path))


def in_two_groups(net: nn.Module) -> Any:
    matrices = [each for each in net.parameters() if each.ndim > 1]
    vectors = [each for each in net.parameters() if each.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "eps": 1e-6}]
    return torch.optim.AdamW(groups, lr=1e-2)


COUPLED = {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": False}
RUNS: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any]]] = {
    "ours": (lambda: Lit(ADAMW), {}),
    "coupled": (lambda: Lit(COUPLED), {}),
    "amsgrad": (lambda: Lit({**ADAMW, "amsgrad": True}), {}),
    "bf16": (lambda: Lit(ADAMW), {"precision": "bf16-true"}),
    "plain": (lambda: Plain(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2)), {}),
    "plain_adam": (lambda: Plain(lambda net: torch.optim.Adam(net.parameters(), lr=1e-2)), {}),
}


def test_statistics_of_a_checkpoint_equal_those_of_the_run(tmp_path: Path) -> None:
    with each_row() as row:
        for name, (build, settings) in RUNS.items():
            with row(name):
                path = tmp_path / f"{name}.ckpt"
                training = fit(build(), path, **settings)
                saved, last_step = inspected(path)
                assert saved.weights == "state_dict"
                assert saved.class_name == (
                    "Adam" if name in ("coupled", "plain_adam") else "AdamW"
                )
                known = {each.name for each in last_step.statistics}
                all_names = {*STATISTICS, UNDERFLOWED.name} - GIVEN_AT_EACH_STEP
                assert known == all_names - NEED_THE_GRADIENT
                for scope in Scope:
                    seen = training.measurement.of(scope, STATISTICS.values())
                    found = last_step.measurement.of(scope, last_step.statistics)
                    assert [*found] == [*seen]
                    for place, values in seen.items():
                        del found[place][UNDERFLOWED.name]
                        expected = {key: each for key, each in values.items() if key in known}
                        assert found[place] == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_groups_of_a_torch_optimizer_keep_their_own_settings(tmp_path: Path) -> None:
    training = fit(Plain(in_two_groups), tmp_path / "last.ckpt")
    saved, last_step = inspected(tmp_path / "last.ckpt")
    # Three vectors of a layer norm and a linear layer have one shape, but only one order.
    assert saved.weights == "state_dict"
    seen = training.measurement.of(Scope.group, last_step.statistics)
    assert seen["group_1"]["eps"] == 1e-6
    found = last_step.measurement.of(Scope.group, last_step.statistics)
    for name, values in seen.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-12)


def save(net: nn.Module, optimizer: torch.optim.Optimizer, path: Path = Path("state.pt")) -> Path:
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return path


def stepped_and_saved(**settings: Any) -> tuple[torch.optim.Optimizer, LastStep]:
    """Returns an optimizer after a step, and the inspection of its saved state and weights."""
    net = network()
    optimizer = stepped(list(net.parameters()), **settings)
    saved, last_step = inspected(save(net, optimizer))
    assert saved.weights == "model"
    return optimizer, last_step


@pytest.mark.parametrize("decoupled", [True, False])
def test_printed_statistics_require_neither_gradient_nor_unknown_weights(
    decoupled: bool,
) -> None:
    optimizer = stepped(
        [torch.nn.Parameter(torch.randn(50))], decoupled=decoupled, weight_decay=0.1
    )
    (state,) = StateReader().after_step(optimizer)

    def changed_by(**tensors: Any) -> set[str]:
        states = ParamStates.of([state, state._replace(**tensors)])
        rows = kernels.measure(states, [*COLUMNS], "eager")
        return {name for name, (a, b) in zip(COLUMNS, rows.T.tolist(), strict=True) if a != b}

    elsewhere = torch.randn(50) * torch.tensor([0.0, 1e3]).repeat(25)
    known = {each.name for each in STATISTICS.values()} - NEED_THE_GRADIENT
    columns = set(
        sources_of(
            ACCUMULATORS[accumulator].column
            for name in known - GIVEN_AT_EACH_STEP
            for accumulator in STATISTICS[name].accumulators
        )
    )
    assert not changed_by(grad=elsewhere) & columns
    assert changed_by(grad=elsewhere)
    assert changed_by(parameter=elsewhere) & columns <= WEIGHT_COLUMNS
    assert changed_by(parameter=elsewhere * float("nan")) & columns <= WEIGHT_COLUMNS | {
        "nonfinite"
    }


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_statistics_for_another_eps_agree_with_the_reference(eps: float) -> None:
    optimizer, last_step = stepped_and_saved(decoupled=True)
    found = measure(last_step.states, last_step.statistics, with_eps(eps)).of(
        Scope.model, last_step.statistics
    )
    tensors = reference_tensors(optimizer)
    for tensor in tensors:
        tensor.eps = eps
    expected = reference_statistics(tensors)
    for name in ("eps_energy_loss", "normalized_update_rms", "update_lost_fraction"):
        assert found["model"][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_for_another_dtype_agree_with_the_reference(dtype: torch.dtype) -> None:
    optimizer, last_step = stepped_and_saved(decoupled=True, lr=1e-4, eps=1e-4, weight_decay=0.1)
    found = measure(last_step.states, last_step.statistics, in_dtype(dtype)).of(
        Scope.model, last_step.statistics
    )
    tensors = reference_tensors(optimizer)
    for each in tensors:
        each.parameter, each.exp_avg = each.parameter.to(dtype), each.exp_avg.to(dtype)
        each.exp_avg_sq = each.exp_avg_sq.to(dtype)
    expected = reference_statistics(tensors)
    for name in (
        "exp_avg_sq_stalled_fraction",
        "update_lost_fraction",
        "decay_lost_fraction",
        "normalized_update_rms",
    ):
        assert found["model"][name] == pytest.approx(expected[name], rel=1e-5)


def planted(path: Path, scale: float) -> None:
    """Saves the state of an optimizer after 50 steps with gradients of a given scale."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(50):
        for each in net.parameters():
            each.grad = scale * torch.randn_like(each)
        optimizer.step()
    save(net, optimizer, path)


def test_dominating_eps_is_found_with_an_override_that_prevents_it(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-9)
    printed = inspection_text(tmp_path / "state.pt")
    assert "eps_dominates (error) in model" in printed
    (eps,) = set(re.findall(r"use: +optimizer\.eps=(\S+)", printed))
    assert 1e-13 < float(eps) < 1e-9
    assert re.search(r"1e-08 +100% █{50}  < configured", printed)
    _, last_step = inspected(tmp_path / "state.pt")
    with_remedy = measure(last_step.states, last_step.statistics, with_eps(float(eps)))
    assert with_remedy.of(Scope.model, last_step.statistics)["model"]["eps_energy_loss"] < 0.1


def test_healthy_state_has_no_findings(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-2)
    assert "\n\nNo issues found\n  class         AdamW\n" in inspection_text(tmp_path / "state.pt")


def test_rules_that_are_not_judged_are_listed_by_reason(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-2)
    torch.save(torch.load(tmp_path / "state.pt")["optimizer"], tmp_path / "moments.pt")
    needs_weights = {"decay_lost", "correlated_updates"}
    with each_row() as row:
        for name, of_weights in [("state", set[str]()), ("moments", needs_weights)]:
            with row(name):
                printed = " ".join(inspection_text(tmp_path / f"{name}.pt").split())
                (judged,) = re.findall(r"rules ([a-z_, ]*[a-z]) [A-Z]", printed)
                judged = {*judged.split(", ")}
                found = {
                    reason: {*codes.split(", ")}
                    for reason, codes in re.findall(r"(need [^:]*): ([a-z_, ]*)", printed)
                }
                gradient = found.pop("need the gradient")
                history = found.pop("need several measurements")
                reason = "need weights or state that are not known"
                assert found.pop(reason, set()) >= of_weights
                assert not found
                assert {"eps_dominates", *needs_weights - of_weights} <= judged
                assert {"exp_avg_sq_lags", "exp_avg_sq_stalled", "updates_lost"} <= gradient
                assert "schedule_exhausted" in history
                assert not of_weights & (judged | gradient | history)


def test_moments_that_underflowed_in_float16_are_counted(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(1000, dtype=torch.float16))
    optimizer = torch.optim.AdamW([weight], eps=1e-4)
    for _ in range(3):
        weight.grad = 1e-3 * torch.randn(1000).half()
        optimizer.step()
    torch.save({"model": {"weight": weight.data}, "optimizer": optimizer.state_dict()}, "state.pt")
    _, last_step = inspected(tmp_path / "state.pt")
    (values,) = last_step.measurement.of(Scope.model, last_step.statistics).values()
    state = optimizer.state[weight]
    zero = (state["exp_avg_sq"] == 0) & (state["exp_avg"] != 0)
    assert values[UNDERFLOWED.name] == zero.double().mean() > 0.9
    assert "eps rounds to 0 in float16" not in inspection_text(tmp_path / "state.pt")


def test_summary_and_findings_precede_the_details(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-9)
    _, summary, finding, hint, details, *_ = inspection_text(tmp_path / "state.pt").split("\n\n")
    title, *rows = summary.splitlines()
    assert title == "1 error"
    assert [row.split(maxsplit=1) for row in rows][:-1] == [
        ["class", "AdamW"],
        ["parameters", "161 in 6 tensors, float32 (model)"],
        ["moments", "float32"],
        ["step", "50"],
        ["lr", "0.001"],
        ["betas", "0.9, 0.999"],
        ["eps", "1e-08"],
        ["weight_decay", "0.01"],
    ]
    assert finding.startswith("eps_dominates (error) in model\n")
    assert " ".join(hint.split()).endswith("pass NAME=VALUE to torch.optim.AdamW.")
    assert details.startswith("Moments\n")


def test_settings_that_differ_name_their_groups(tmp_path: Path) -> None:
    fit(Plain(in_two_groups), tmp_path / "last.ckpt")
    printed = inspection_text(tmp_path / "last.ckpt")
    assert re.search("eps +1e-08 in group_0; 1e-06 in group_1\n", printed)
    assert re.search("lr +0.01\n", printed)


def test_settings_of_many_groups_are_a_range(tmp_path: Path) -> None:
    lrs = (1e-4, 1e-3, 1e-2, 1e-1)
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.AdamW(groups)
    for group in groups:
        group["params"][0].grad = torch.ones(2)  # type: ignore[index]
    optimizer.step()
    torch.save(optimizer.state_dict(), "state.pt")
    assert re.search("lr +0.0001 to 0.1 in 4 groups\n", inspection_text(tmp_path / "state.pt"))


def test_rows_of_zeros_are_combined_in_one_line(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-2)
    printed = inspection_text(tmp_path / "state.pt")
    assert "v stalled; v subnormal; m=v=0; update lost; decay lost: 0%\n" in printed
    curve = printed.split("for different values of eps\n")[1].split("\n\n")[0].splitlines()
    assert [line for line in curve if re.search(" 0%$", line)] == [curve[-2]]
    assert re.fullmatch(r"  \d+ other values of eps: 0%", curve[-2])
    assert re.search("1e-08 +0% +< configured", "\n".join(curve))


def test_run_of_a_checkpoint_has_the_keys_and_values_of_its_last_step(tmp_path: Path) -> None:
    training = fit(Lit(ADAMW), tmp_path / "last.ckpt")
    run = run_of(inspect(tmp_path / "last.ckpt"))
    expected = {
        key: value
        for key, value in training.compute().items()
        if key.rpartition("/")[2] not in NEED_THE_GRADIENT | GIVEN_AT_EACH_STEP
    }
    found = {key: float(series.values[-1]) for key, series in run.series.items()}
    assert expected == pytest.approx({key: found[key] for key in expected}, rel=1e-5, abs=1e-12)
    assert {key.rpartition("/")[2] for key in found.keys() - expected.keys()} == {
        f"{quantity}_p{percent}"
        for quantity in ("denominator", "normalized_update")
        for percent in (1, 50, 99)
    }
    assert {*map(int, (each.steps[-1] for each in run.series.values()))} == {STEPS}
    exponents = training.compute_exponents()
    assert run.histograms == {
        key: {STEPS: fold(counts)} for key, counts in exponents.items() if "/grad" not in key
    }


def test_run_of_a_checkpoint_has_the_config_of_its_optimizers(tmp_path: Path) -> None:
    fit(TwoOptimizers(torch.optim.Adam), tmp_path / "two.ckpt")
    fit(Plain(in_two_groups), tmp_path / "one.ckpt")
    (two, one) = (
        run_of(inspect(tmp_path / f"{name}.ckpt")).config["lightning_adam"]
        for name in ("two", "one")
    )
    assert [(name, each["class"]) for name, each in two["optimizer"].items()] == [
        ("0", "AdamW"),
        ("1", "Adam"),
    ]
    assert one["run"] == {"parameters": sum(each.numel() for each in network().parameters())}
    assert one["optimizer"]["param_groups"]["group_1"]["eps"] == 1e-6
    assert one["optimizer"]["betas"] == [0.9, 0.999]


def test_page_shows_every_optimizer_of_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(TwoOptimizers(torch.optim.Adam), tmp_path / "last.ckpt")
    main(["inspect", "last.ckpt", "--html", "page.html"])
    assert capsys.readouterr().out.endswith("\n\nreport: page.html\n")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "last.ckpt" in page
    keys = run_of(inspect(Path("last.ckpt"))).series
    for name in "01":
        assert f"adam_update/optimizer/{name}/update_norm" in keys
        assert f"adam_update/optimizer/{name}/layer/" in " ".join(keys)


def test_output_has_at_most_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Lit({**ADAMW, "amsgrad": True}), tmp_path / "last.ckpt")
    main(["inspect", str(tmp_path / "last.ckpt")])
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].endswith(f", epoch 1, global_step {STEPS}")
    assert max(len(line) for line in lines[1:]) <= 100
    assert not [line for line in lines if line != line.rstrip()]
    assert "layer net.0" in captured.out
    assert "group no_decay" in captured.out
    assert "nan" not in captured.out.lower().replace("the step is nan", "")


def test_each_of_two_optimizers_is_printed(tmp_path: Path) -> None:
    fit(TwoOptimizers(torch.optim.Adam), tmp_path / "last.ckpt")
    printed = inspection_text(tmp_path / "last.ckpt")
    assert "Optimizer 0: No issues found\n  class         AdamW\n" in printed
    assert "Optimizer 1: No issues found\n  class         Adam\n" in printed


def test_optimizer_other_than_adam_is_not_inspected_and_noted(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-2)
    content = torch.load("state.pt")
    weight = nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3)
    sgd.step()
    torch.save({**content, "sgd": sgd.state_dict()}, "both.pt")
    printed = inspection_text(tmp_path / "both.pt")
    assert (
        "Not inspected: optimizer sgd: not the state of an Adam-like optimizer: it has" in printed
    )
    assert "No issues found\n  class         AdamW\n" in printed


def test_weights_of_a_compiled_module_are_found(tmp_path: Path) -> None:
    module = Lit(ADAMW)
    fit(module, tmp_path / "last.ckpt")
    content = torch.load("last.ckpt")
    content["state_dict"] = {
        name.replace("net.", "net._orig_mod."): each for name, each in content["state_dict"].items()
    }
    torch.save(content, "compiled.ckpt")
    assert inspected(tmp_path / "compiled.ckpt")[0].weights == "state_dict"


@pytest.mark.parametrize("with_frozen", [False, True])
def test_weights_that_cannot_be_matched_are_not_used(with_frozen: bool, tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    optimizer = stepped(list(net[with_frozen:].parameters()), decoupled=True)
    saved, last_step = inspected(save(net, optimizer))
    assert bool(saved.weights) is not with_frozen
    known = {each.name for each in last_step.statistics}
    assert ("update_lost_fraction" in known) is not with_frozen
    assert {"eps_energy_loss", "normalized_update_rms", "nonfinite_count"} <= known
    assert ("The weights are unknown" in inspection_text(tmp_path / "state.pt")) is with_frozen


def test_weights_with_an_unusual_name_are_used_only_if_no_others_match() -> None:
    net = network()
    state = stepped(list(net.parameters()), decoupled=True).state_dict()
    rows = [
        (("actor",), "actor"),
        (("actor", "critic"), ""),
        (("actor", "model"), "model"),
        (("model", "state_dict"), ""),
    ]
    with each_row() as row:
        for names, expected in rows:
            with row(names):
                torch.save({**dict.fromkeys(names, net.state_dict()), "optimizer": state}, "two.pt")
                saved, _ = inspected(Path("two.pt"))
                assert saved.weights == expected
                are_known = not any("weights are unknown" in each for each in saved.notes)
                assert are_known == bool(expected)


def test_two_networks_with_the_same_names_leave_the_weights_unknown() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.named_parameters())
    for each in net.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    rows = [(("actor", "critic"), ""), (("actor", "model"), "model"), (("actor",), "actor")]
    with each_row() as row:
        for names, expected in rows:
            with row(names):
                content = {**dict.fromkeys(names, net.state_dict()), "o": optimizer.state_dict()}
                torch.save(content, "two.pt")
                saved, _ = inspected(Path("two.pt"))
                assert saved.weights == expected
                notes = " ".join(saved.notes)
                assert ("actor and critic fit equally well" in notes) == (not expected)
                assert ("those of model. actor would also fit." in notes) == (expected == "model")


def test_optimizer_state_alone_is_printed_without_weights(tmp_path: Path) -> None:
    optimizer = stepped(list(network().parameters()), decoupled=True)
    torch.save(optimizer.state_dict(), "optimizer.pt")
    printed = inspection_text(tmp_path / "optimizer.pt")
    assert "in 6 tensors, weights unknown\n  moments       float32" in printed
    assert "decay/update" not in printed
    assert "lost to eps" in printed


def test_buffers_and_tied_weights_are_not_counted_as_parameters(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    optimizer = stepped(list(net.parameters()), decoupled=True)
    _, last_step = inspected(save(net, optimizer))
    names = [name for name, _ in net.named_parameters()]
    assert [each.tensor for each in last_step.states.scopes.names] == names
    for stored, parameter in zip(last_step.states.parameter, net.parameters(), strict=True):
        assert torch.equal(stored, parameter)


def test_finished_schedule_is_shown_at_its_peak_lr(tmp_path: Path) -> None:
    fit(Lit(ADAMW, {"name": "linear"}), tmp_path / "last.ckpt")
    printed = inspection_text(tmp_path / "last.ckpt")
    assert "The schedule has ended at lr 0. Updates and decay are shown at the peak lr." in printed
    assert re.search(r"lr +0 \(peak 0.01\)", printed)
    assert "update/weight" in printed


def test_statistics_at_the_end_of_a_schedule_equal_those_at_its_peak_lr() -> None:
    net = network()
    optimizer = stepped(list(net.parameters()), decoupled=True, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    optimizer.step()

    def model_statistics(file: str) -> dict[str, float]:
        _, last_step = inspected(save(net, optimizer, Path(file)))
        return last_step.measurement.of(Scope.model, last_step.statistics)["model"]

    at_peak = model_statistics("peak.pt")
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0]
    assert model_statistics("end.pt") == at_peak
    assert at_peak["update_to_weight"] > 0


def test_only_moments_are_shown_for_an_optimizer_with_an_unknown_step(tmp_path: Path) -> None:
    fit(Plain(lambda net: torch.optim.NAdam(net.parameters())), tmp_path / "last.ckpt")
    saved, last_step = inspected(tmp_path / "last.ckpt")
    assert not saved.is_adam
    known = {each.name for each in last_step.statistics}
    assert "exp_avg_rms" in known
    assert not known & {"normalized_update_rms", "eps_energy_loss", "denominator_mean"}
    assert "unknown, with Adam's moments" in inspection_text(tmp_path / "last.ckpt")


def test_non_finite_state_is_found(tmp_path: Path) -> None:
    planted(tmp_path / "state.pt", 1e-2)
    content = torch.load("state.pt")
    content["optimizer"]["state"][0]["exp_avg"][0, :2] = torch.nan
    torch.save(content, "state.pt")
    printed = inspection_text(tmp_path / "state.pt")
    assert "not_finite (error)" in printed
    assert "2 elements are NaN or infinite." in printed


def test_hyperparameters_of_unknown_classes_are_ignored(tmp_path: Path) -> None:
    class Hyper(Lit):
        def __init__(self, optimizer: Any) -> None:
            super().__init__(optimizer)
            self.save_hyperparameters()

    fit(Hyper(OmegaConf.merge(OmegaConf.structured(AdamConfig), ADAMW)), tmp_path / "last.ckpt")
    assert inspected(tmp_path / "last.ckpt")[0].is_recorded


def truncated(path: Path) -> None:
    planted(path, 1.0)
    path.write_bytes(path.read_bytes()[:-300])


NOT_READ = "cannot be read: it is damaged, or not a file of torch.save"
UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "does not exist. Pass a checkpoint"),
    (Path.mkdir, "is a folder, the checkpoint of a sharded strategy. Run"),
    (Path.touch, NOT_READ),
    (lambda path: path.write_text("hello, this is no checkpoint"), NOT_READ),
    (truncated, NOT_READ),
    (
        lambda path: torch.save([1], path),
        "an object of class list, not a checkpoint or a state_dict. Save the state with",
    ),
    (lambda path: torch.save(network().state_dict(), path), "has no optimizer state"),
    (
        lambda path: fit(
            Plain(lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)), path
        ),
        "not the state of an Adam-like optimizer: it has momentum_buffer",
    ),
    (
        lambda path: torch.save(torch.optim.Adam(network().parameters()).state_dict(), path),
        "the optimizer state is empty, before the first step",
    ),
]
"""Functions that write an invalid file, and the errors."""


def test_unusable_files_raise(tmp_path: Path) -> None:
    with each_row() as row:
        for number, (make, message) in enumerate(UNUSABLE):
            path = tmp_path / f"{number}.pt"
            with row((number, message)):
                make(path)
                with pytest.raises(ConfigError, match=re.escape(message)) as raised:
                    inspection_text(path)
                assert "\n" not in str(raised.value)
                assert str(raised.value).startswith(str(path))


def test_command_prints_findings_and_fails_for_a_missing_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(tmp_path / "state.pt", 1e-9)
    main(["inspect", "state.pt"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("state.pt: a file of torch.save\n\n1 error\n  class ")
    assert "use:     optimizer.eps=" in captured.out
    with pytest.raises(SystemExit) as raised:
        main(["inspect", "nowhere.ckpt"])
    assert raised.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lightning-adam inspect: nowhere.ckpt does not exist.")
