"""AdamStatistics without Lightning: its values, tables and errors."""

import pickle
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lightning_adam import AdamStatistics, ConfigError
from tests.statistics.cases import stepped
from tests.support.agreement import bare
from tests.support.tables import each_row


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))


@pytest.fixture
def net() -> nn.Sequential:
    return small_net()


def optimizer_of(net: nn.Module, **settings: Any) -> Optimizer:
    return stepped([{"params": list(net.parameters())}], decoupled=True, **settings)


def test_call_measures_and_computes_without_accumulating(net: nn.Module) -> None:
    statistics, optimizer = AdamStatistics("grad_norm", scopes=["model"]), optimizer_of(net)
    first = statistics(optimizer)
    assert statistics(optimizer) == first == statistics.compute()
    assert list(first) == ["adam_gradient/grad_norm"]


def test_reset_clears_values_histograms_and_table(net: nn.Module) -> None:
    statistics = AdamStatistics()
    statistics.update(optimizer_of(net), histograms=True)
    statistics.reset()
    assert statistics.compute() == {}
    assert statistics.compute_exponents() == {}
    assert statistics.table("layer") == []


def test_metric_can_be_in_a_metric_collection(net: nn.Module) -> None:
    collection = MetricCollection({"all": AdamStatistics("all"), "lr": AdamStatistics("lr")})
    collection.update(optimizer_of(net))
    values = collection.compute()
    assert any("decay_timescale" in key for key in values)


def test_table_has_a_row_with_the_values_of_each_layer(net: nn.Module) -> None:
    statistics = AdamStatistics(scopes=["layer"], module=net)
    statistics.update(optimizer_of(net))
    values, rows = statistics.compute(), statistics.table("layer")
    assert [row["layer"] for row in rows] == ["0", "1.0", "1.1"]
    for row in rows:
        for name, value in list(row.items())[1:]:
            (key,) = (key for key in values if key.endswith(f"/layer/{row['layer']}/{name}"))
            assert values[key] == value


def test_table_of_an_unknown_scope_raises() -> None:
    with pytest.raises(ConfigError, match="scope='layers' must be 'group', 'layer' or 'tensor'"):
        AdamStatistics().table("layers")


def test_table_of_an_optimizer_without_defined_statistics_has_only_names(net: nn.Module) -> None:
    statistics = AdamStatistics("eps_energy_loss", module=net)
    statistics.update(torch.optim.NAdam(net.parameters()))
    assert statistics.table("layer") == []
    optimizer = torch.optim.NAdam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    statistics.update(optimizer)
    assert statistics.table("layer") == [{"layer": name} for name in ("0", "1.0", "1.1")]


def test_copies_have_the_measurement_and_continue_measuring(net: nn.Module) -> None:
    statistics, optimizer = AdamStatistics("all", ["layer"], module=net), optimizer_of(net)
    statistics.update(optimizer, histograms=True)
    values = statistics.compute()
    clone: Any = statistics.clone()
    unpickled = pickle.loads(pickle.dumps(statistics))
    for copy in (clone, unpickled):
        assert copy.compute() == values
        assert copy.compute_exponents() == statistics.compute_exponents()
    clone.update(optimizer)
    assert clone.compute() == values, "the clone names the same module"
    assert len(unpickled(optimizer)) < len(values), "the module is not pickled"


def test_nothing_is_measured_before_the_first_update() -> None:
    measurement = AdamStatistics("all").measurement
    assert not measurement.has_nonfinite
    assert measurement.is_empty
    assert measurement.values() == {}
    assert measurement.exponent_counts() == {}


@pytest.mark.parametrize("wrapper", ["lightning", "fabric", "accelerate"])
def test_wrapped_optimizer_is_measured_like_the_inner_one(wrapper: str) -> None:
    optimizer = optimizer_of(small_net())
    wrapped: Any = optimizer
    if wrapper == "lightning":
        wrapped = LightningOptimizer(optimizer)
    elif wrapper == "fabric":
        wrapped = _FabricOptimizer(optimizer, SingleDeviceStrategy())
    else:
        # Like the wrapper of Accelerate, which is an Optimizer itself.
        kind = type("AcceleratedOptimizer", (Optimizer,), {"__module__": "accelerate.optimizer"})
        wrapped = kind([nn.Parameter(torch.ones(1))], {})
        wrapped.optimizer = optimizer
    assert AdamStatistics("all")(wrapped) == AdamStatistics("all")(optimizer)


def test_worst_has_fixed_keys_and_names_the_tensors(net: nn.Module) -> None:
    def grad(parameter: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(parameter, 10.0 ** -parameter.numel())

    worst = {"grad_max": 2, "nonfinite_count": 1}
    statistics = AdamStatistics(["lr"], worst=worst, module=net)
    statistics.update(optimizer_of(net, grad=grad))
    tensors = {key: name for key, (_, name) in statistics.measurement.worst_tensors().items()}
    assert tensors == {
        "adam_gradient/worst_1/grad_max": "1.1.bias",
        "adam_gradient/worst_2/grad_max": "0.bias",
        "adam_underflow/worst_1/nonfinite_count": "0.weight",
    }
    assert statistics.compute()["adam_gradient/worst_1/grad_max"] == pytest.approx(0.01)


def test_nan_is_the_largest_value() -> None:
    with each_row() as row:
        for sick in ("0.weight", "0.bias", "1.0.weight", "1.1.bias"):
            net = small_net()
            optimizer = optimizer_of(net)
            worst = {"grad_max": 2, "nonfinite_count": 1}
            statistics = AdamStatistics("lr", worst=worst, module=net)
            net.get_parameter(sick).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
            statistics.update(optimizer)
            first, second, count = (
                name for _, name in statistics.measurement.worst_tensors().values()
            )
            with row(sick):
                assert first == count == sick
                assert second != sick


def test_norm_before_clipping_is_that_of_the_next_update(net: nn.Module) -> None:
    optimizer, statistics = (
        optimizer_of(net),
        AdamStatistics(["grad*", "clip*"], ["model", "layer"]),
    )
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    grads = [each.grad.double().flatten() for each in parameters if each.grad is not None]
    norm = torch.cat(grads).norm().item()
    statistics.before_clip(optimizer)
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
    values = bare(statistics(optimizer))
    assert values["grad_norm_before_clip"] == pytest.approx(norm)
    assert values["clip_coefficient"] == pytest.approx(0.5 / norm, rel=1e-5)
    assert "clip_coefficient" not in bare(statistics(optimizer)), "no gradient was clipped again"


@pytest.mark.parametrize("kernel", ["eager", "numba"])
def test_default_device_does_not_matter(net: nn.Module, kernel: str) -> None:
    optimizer = optimizer_of(net)
    statistics, scale = AdamStatistics("all", kernel=kernel), torch.tensor(8.0)
    values = statistics(optimizer, histograms=True, loss_scale=scale)
    counts = statistics.compute_exponents()
    with torch.device("meta"):
        statistics.before_clip(optimizer)
        found = statistics(optimizer, histograms=True, loss_scale=scale)
        assert statistics.compute_exponents() == counts
    assert found.items() >= values.items()
    assert "adam_gradient/grad_norm_before_clip" in found


def test_loss_scale_is_reported_if_given(net: nn.Module) -> None:
    optimizer, statistics = optimizer_of(net), AdamStatistics("loss_scale")
    assert statistics(optimizer) == {}
    values = statistics(optimizer, loss_scale=torch.tensor(65536.0))
    assert values == {"adam_gradient/loss_scale": 65536.0}


INVALID: list[tuple[dict[str, Any], str]] = [
    (
        {"statistics": "grad_nrom"},
        r"^statistics='grad_nrom' matches no statistic: .* statistics=\['grad_norm'\]$",
    ),
    ({"statistics": ["headline", 3]}, r"^statistics=\['headline', 3\] must be headline, all, or"),
    (
        {"scopes": ["module"]},
        r"^scopes=\['module'\] has 'module', which must be 'model', 'group', 'layer' or 'tensor'\.",
    ),
    ({"layer_depth": 0}, r"^layer_depth=0 must be at least 1\. Use .* layer_depth=2$"),
    ({"worst": {"grad_nrm": 2}}, r"^worst\.grad_nrm=2 is not a statistic.* worst\.grad_norm=2$"),
    ({"worst": {"grad_norm": 0}}, r"^worst\.grad_norm=0 must be at least 1, a number of tensors\."),
    (
        {"worst": {"grad_norm": "many"}},
        r"^worst=\{'grad_norm': 'many'\} has 'many', which must be an integer\.",
    ),
    (
        {"rule_statistics": ["grad_nrm"]},
        r"^rule_statistics=\['grad_nrm'\] must hold names of statistics, unlike grad_nrm\. .*"
        r"rule_statistics=\['grad_norm'\]$",
    ),
]
"""Arguments and their errors."""


def test_invalid_arguments_raise() -> None:
    with each_row() as row:
        for arguments, sentence in INVALID:
            with row(arguments), pytest.raises(ConfigError, match=sentence):
                AdamStatistics(**arguments)
