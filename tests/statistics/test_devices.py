"""Devices without float64 are measured in a copy on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_adam import AdamStatistics
from tests.support.tables import each_row


class OnMps(Tensor):
    """A tensor that reports MPS as its device and rejects float64; its values are on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        make: Any = Tensor._make_wrapper_subclass
        device = torch.device("mps")
        return make(cls, values.shape, strides=values.stride(), dtype=values.dtype, device=device)

    def __init__(self, values: Tensor) -> None:
        self.values_on_cpu = values

    def data_ptr(self) -> int:
        return self.values_on_cpu.data_ptr()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        arguments = (args, dict(kwargs or {}))
        args, kwargs = tree_map(lambda each: getattr(each, "values_on_cpu", each), arguments)
        device = torch.device(kwargs.get("device") or "mps")
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return result if device.type == "cpu" else tree_map(_on_mps, result)


def _on_mps(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype is torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    return OnMps(value)


def test_device_rejects_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        OnMps(torch.ones(2)).double()


def test_mps_is_measured_like_the_cpu() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"amsgrad": True, "weight_decay": 0.1},
        {"lr": torch.tensor(1e-3), "eps": 1e-16},
    ]
    with each_row() as row:
        for setting in settings:
            torch.manual_seed(0)
            values, grads = torch.randn(40, 3), torch.randn(3, 40, 3)
            found = []
            places: list[Callable[[Tensor], Tensor]] = [lambda tensor: tensor, OnMps]
            for place in places:
                weight = nn.Parameter(place(values.clone()))
                own: dict[str, Any] = {
                    name: place(each) if isinstance(each, Tensor) else each
                    for name, each in setting.items()
                }
                adam = torch.optim.Adam([weight], foreach=False, fused=False, **own)
                statistics = AdamStatistics("all")
                for grad in grads:
                    weight.grad = place(grad.clone())
                    statistics.before_clip(adam)
                    adam.step()
                found.append((statistics(adam, histograms=True), statistics.compute_exponents()))
            with row(setting):
                assert len(found[0][0]) >= 40
                assert found[0] == found[1]
