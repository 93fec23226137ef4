"""AdamStatistics without Lightning: what it returns, draws and refuses."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lightning_adam import AdamStatistics, ConfigError
from tests.statistics.cases import stepped


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))


def trained(net: nn.Module, **settings: Any) -> Optimizer:
    return stepped([{"params": list(net.parameters())}], decoupled=True, **settings)


def test_calling_it_measures_and_computes_without_accumulating(net: nn.Module) -> None:
    statistics, optimizer = AdamStatistics("grad_norm", scopes=["model"]), trained(net)
    first = statistics(optimizer)
    assert statistics(optimizer) == first == statistics.compute()
    assert list(first) == ["adam_moments/grad_norm"]


def test_reset_forgets(net: nn.Module) -> None:
    statistics = AdamStatistics()
    statistics.update(trained(net), histograms=True)
    statistics.reset()
    assert statistics.compute() == {}
    assert statistics.compute_exponents() == {}
    assert statistics.table("layer") == []


def test_in_a_collection(net: nn.Module) -> None:
    collection = MetricCollection({"all": AdamStatistics("all"), "lr": AdamStatistics("lr")})
    collection.update(trained(net))
    values = collection.compute()
    assert any("decay_timescale" in key for key in values)


def test_the_table_has_a_row_for_each_layer_with_the_keys_numbers(net: nn.Module) -> None:
    statistics = AdamStatistics(scopes=["layer"], module=net)
    statistics.update(trained(net))
    values, rows = statistics.compute(), statistics.table("layer")
    assert [row["layer"] for row in rows] == ["0", "1.0", "1.1"]
    for row in rows:
        for name, value in list(row.items())[1:]:
            (key,) = (key for key in values if key.endswith(f"/{name}/layer/{row['layer']}"))
            assert values[key] == value


def test_a_scope_without_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected group, layer or tensor, but got layers"):
        AdamStatistics().table("layers")


def test_a_clone_has_the_measurement(net: nn.Module) -> None:
    statistics = AdamStatistics(module=net)
    statistics.update(trained(net))
    assert statistics.clone().compute() == statistics.compute()


def test_worst_names_the_tensors_with_the_largest_values(net: nn.Module) -> None:
    def grad(parameter: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(parameter, 10.0 ** -parameter.numel())

    worst = {"grad_max": 2, "nonfinite_count": 1}
    statistics = AdamStatistics(["lr"], ["model"], worst=worst, module=net)
    optimizer = trained(net, grad=grad)
    statistics.update(optimizer)
    tensors = [key for key in statistics.compute() if "grad_max/tensor" in key]
    assert tensors == [
        "adam_moments/grad_max/tensor/1.1.bias",
        "adam_moments/grad_max/tensor/0.bias",
    ]


@pytest.mark.parametrize("sick", ["0.weight", "0.bias", "1.0.weight", "1.1.bias"])
def test_nan_is_the_worst(net: nn.Module, sick: str) -> None:
    statistics = AdamStatistics("lr", worst={"grad_max": 2, "nonfinite_count": 1}, module=net)
    optimizer = trained(net)
    net.get_parameter(sick).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    statistics.update(optimizer)
    first, second, count = list(statistics.compute())[2:]
    assert first == f"adam_moments/grad_max/tensor/{sick}"
    assert second != first
    assert count == f"adam_underflow/nonfinite_count/tensor/{sick}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"statistics": "grad_nrom"}, "grad_nrom is none; type for example"),
        ({"statistics": ["headline", 3]}, "expected headline, all"),
        ({"scopes": ["module"]}, r"expected one of \[model, group, layer, tensor\]"),
        ({"layer_depth": 0}, "layer_depth=0: expected an integer of at least 1"),
        ({"worst": {"grad_nrm": 2}}, "worst.grad_nrm=2: no such field.*worst.grad_norm=2"),
        ({"worst": {"grad_norm": 0}}, "worst.grad_norm=0: expected the number of tensors"),
        ({"worst": {"grad_norm": "many"}}, "could not be converted to Integer"),
        ({"judged": ["grad_nrm"]}, r"but grad_nrm is none; .*AdamStatistics.judged=\[grad_norm\]"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AdamStatistics(**arguments)


def test_plot_draws_lines_of_several_measurements_and_bars_of_one(net: nn.Module) -> None:
    statistics = AdamStatistics(["lr", "grad_norm", "update/*"])
    values = [statistics(trained(net, steps=steps)) for steps in (1, 2, 3)]
    _, axes = statistics.plot(values)
    assert [ax.get_title() for ax in axes] == [  # type: ignore[union-attr]
        "grad_norm",
        "update_norm",
        "direction_rms",
        "direction_max",
        "direction_large_fraction",
        "update_to_weight",
        "lr",
    ]
    line = axes[0].get_lines()[0]  # type: ignore[index]
    assert np.array_equal(line.get_ydata(), [each["adam_moments/grad_norm"] for each in values])
    _, axes = statistics.plot()
    assert len(axes[0].patches) == 2, "the model and its group"  # type: ignore[index]
    pyplot.close("all")


def test_plot_into_axes_that_are_given() -> None:
    statistics = AdamStatistics("lr")
    with pytest.raises(ValueError, match="nothing to plot: expected measurements"):
        statistics.plot()
    values = statistics(stepped([nn.Parameter(torch.ones(3))], decoupled=True))
    figure, ax = pyplot.subplots()
    assert statistics.plot(values, ax) == (figure, ax)
    with pytest.raises(ValueError, match=r"choose one.*statistics=\['grad_norm'\]"):
        AdamStatistics().plot({"adam_moments/grad_norm": 1.0, "adam_schedule/lr": 1.0}, ax)
    pyplot.close("all")


def test_without_matplotlib_plot_says_what_to_install_and_all_else_works() -> None:
    script = """
import sys, torch
from lightning_adam import AdamStatistics
weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)
adam = torch.optim.Adam([weight]); adam.step()
statistics = AdamStatistics(); statistics(adam)
for name in [each for each in sys.modules if each.startswith("matplotlib")] + ["matplotlib"]:
    sys.modules[name] = None
try:
    statistics.plot()
except ModuleNotFoundError as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install 'lightning-adam[dashboard]'" in done.stdout
