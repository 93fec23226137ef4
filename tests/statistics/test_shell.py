"""AdamStatistics without Lightning: its values, tables, plots and errors."""

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


def test_metric_collection_holds_it(net: nn.Module) -> None:
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
            (key,) = (key for key in values if key.endswith(f"/{name}/layer/{row['layer']}"))
            assert values[key] == value


def test_table_of_an_unknown_scope_raises() -> None:
    with pytest.raises(ConfigError, match="scope='layers' must be 'group', 'layer' or 'tensor'"):
        AdamStatistics().table("layers")


def test_clone_keeps_the_measurement(net: nn.Module) -> None:
    statistics = AdamStatistics(module=net)
    statistics.update(optimizer_of(net))
    assert statistics.clone().compute() == statistics.compute()


def test_worst_names_the_tensors_with_the_largest_values(net: nn.Module) -> None:
    def grad(parameter: torch.Tensor, step: int) -> torch.Tensor:
        return torch.full_like(parameter, 10.0 ** -parameter.numel())

    worst = {"grad_max": 2, "nonfinite_count": 1}
    statistics = AdamStatistics(["lr"], ["model"], worst=worst, module=net)
    optimizer = optimizer_of(net, grad=grad)
    statistics.update(optimizer)
    tensors = [key for key in statistics.compute() if "grad_max/tensor" in key]
    assert tensors == [
        "adam_gradient/tensor/1.1.bias/grad_max",
        "adam_gradient/tensor/0.bias/grad_max",
    ]


def test_nan_is_the_largest_value() -> None:
    with each_row() as row:
        for sick in ("0.weight", "0.bias", "1.0.weight", "1.1.bias"):
            net = small_net()
            optimizer = optimizer_of(net)
            worst = {"grad_max": 2, "nonfinite_count": 1}
            statistics = AdamStatistics("lr", worst=worst, module=net)
            net.get_parameter(sick).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
            statistics.update(optimizer)
            first, second, count = list(statistics.compute())[2:]
            with row(sick):
                assert first == f"adam_gradient/tensor/{sick}/grad_max"
                assert second != first
                assert count == f"adam_underflow/tensor/{sick}/nonfinite_count"


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
        {"judged": ["grad_nrm"]},
        r"^judged=\['grad_nrm'\] must hold names of statistics, unlike grad_nrm\. .*"
        r"judged=\['grad_norm'\]$",
    ),
]
"""Arguments, and the error they give."""


def test_invalid_arguments_raise() -> None:
    with each_row() as row:
        for arguments, sentence in INVALID:
            with row(arguments), pytest.raises(ConfigError, match=sentence):
                AdamStatistics(**arguments)


def test_plot_draws_lines_of_several_measurements_and_bars_of_one(net: nn.Module) -> None:
    statistics = AdamStatistics(["lr", "grad_norm", "update/*"])
    values = [statistics(optimizer_of(net, steps=steps)) for steps in (1, 2, 3)]
    _, axes = statistics.plot(values)
    assert [ax.get_title() for ax in axes] == [  # type: ignore[union-attr]
        "grad_norm",
        "update_norm",
        "normalized_update_rms",
        "normalized_update_max",
        "normalized_update_large_fraction",
        "update_to_weight",
        "lr",
    ]
    line = axes[0].get_lines()[0]  # type: ignore[index]
    assert np.array_equal(line.get_ydata(), [each["adam_gradient/grad_norm"] for each in values])
    _, axes = statistics.plot()
    assert len(axes[0].patches) == 2, "the model and its group"  # type: ignore[index]
    pyplot.close("all")


def test_plot_draws_into_given_axes() -> None:
    statistics = AdamStatistics("lr")
    with pytest.raises(ValueError, match="nothing to plot"):
        statistics.plot()
    values = statistics(stepped([nn.Parameter(torch.ones(3))], decoupled=True))
    figure, ax = pyplot.subplots()
    assert statistics.plot(values, ax) == (figure, ax)
    with pytest.raises(ValueError, match=r"Choose one.*statistics=\['grad_norm'\]"):
        AdamStatistics().plot({"adam_gradient/grad_norm": 1.0, "adam_schedule/lr": 1.0}, ax)
    pyplot.close("all")


def test_plot_without_matplotlib_names_the_extra_to_install(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lightning_adam.statistics.plots", raising=False)
    statistics = AdamStatistics()
    assert statistics(optimizer_of(net))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-adam\[dashboard\]'"):
        statistics.plot()
