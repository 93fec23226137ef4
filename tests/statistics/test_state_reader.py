"""Reading the state of an optimizer: always current, with names, and without side effects."""

import copy
import gc
import math
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_adam import AdamStatistics
from lightning_adam.statistics.state_reader import StateReader
from tests.statistics.cases import reference_tensors
from tests.support import oracle
from tests.support.agreement import assert_agree, bare
from tests.support.tables import each_row

SCOPES = ["model", "group", "layer", "tensor"]
NORM = "adam_weight_decay/weight_norm"


class Net(nn.Module):
    """A direct parameter, a body and a head; the scale may have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3)))
        self.head = nn.Linear(3, 2)
        self.is_scaled = True

    @property
    def linear(self) -> nn.Linear:
        first = self.body[0]
        assert isinstance(first, nn.Linear)
        return first

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.body(inputs)
        outputs: Tensor = self.head(hidden * self.scale if self.is_scaled else hidden)
        return outputs


def optimizer_of(net: Net) -> AdamW:
    """Returns an optimizer of all parameters except the head, in two groups."""
    others = [net.scale, net.linear.bias, *net.body[1].parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [net.linear.weight], "name": "decay", "weight_decay": 0.1},
        {"params": others, "name": "rest"},
    ]
    return AdamW(groups, lr=0.01, weight_decay=0.0)


def train(net: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()


def statistics(net: nn.Module | None = None, layer_depth: int | None = None) -> AdamStatistics:
    return AdamStatistics("all", SCOPES, layer_depth=layer_depth, module=net)


def values(metric: AdamStatistics, optimizer: Optimizer) -> dict[str, float]:
    metric.update(optimizer)
    return metric.compute()


def references(net: nn.Module, optimizer: Optimizer) -> dict[str, list[oracle.Tensor]]:
    """Returns the tensors of every scope by its part of the keys."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [(group["name"], each) for group in optimizer.param_groups for each in group["params"]]
    trained = [(group, each) for group, each in groups if each.grad is not None]
    scopes = defaultdict(list)
    for (group, parameter), tensor in zip(trained, reference_tensors(optimizer), strict=True):
        path = names[parameter]
        layer = path.rpartition(".")[0] or "root"
        for scope in ("", f"group/{group}/", f"layer/{layer}/", f"tensor/{path}/"):
            scopes[scope].append(tensor)
    return scopes


def assert_agrees(kept: AdamStatistics, net: nn.Module, optimizer: Optimizer) -> None:
    """Asserts that a reused metric agrees with a new one and the reference in each scope."""
    actual = values(kept, optimizer)
    assert actual == values(statistics(net), optimizer)
    scopes = references(net, optimizer)
    for scope, tensors in scopes.items():
        assert_agree(bare(actual, scope), tensors, "numba")
    assert len(actual) == sum(len(bare(actual, scope)) for scope in scopes)


def load_checkpoint(net: Net, optimizer: AdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def recreate_state(net: Net, optimizer: AdamW) -> None:
    for state in optimizer.state.values():
        state.update({name: tensor.clone() for name, tensor in state.items()})


def unfreeze(net: Net, optimizer: AdamW) -> None:
    if len(optimizer.param_groups) == 2:
        optimizer.add_param_group({"params": net.head.parameters(), "name": "head"})


def freeze(net: Net, optimizer: AdamW) -> None:
    net.linear.weight.requires_grad_(False).grad = None


def toggle_scale(net: Net, optimizer: AdamW) -> None:
    net.is_scaled = not net.is_scaled


def rename(net: Net, optimizer: AdamW) -> None:
    first, second = optimizer.param_groups[:2]
    first["name"], second["name"] = second["name"], first["name"] + "ed"


def change_settings(net: Net, optimizer: AdamW) -> None:
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    optimizer.param_groups[1].update(weight_decay=0.2, eps=1e-3, maximize=True)


def replace_groups(net: Net, optimizer: AdamW) -> None:
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [*group["params"]]} for group in groups]


def move_between_groups(net: Net, optimizer: AdamW) -> None:
    first, second = (group["params"] for group in optimizer.param_groups[:2])
    first.append(second.pop(0))
    second.append(first.pop(0))


def replace_parameter(net: Net, optimizer: AdamW) -> None:
    """Replaces a parameter, as `model.to` sometimes does."""
    old, new = net.linear.bias, nn.Parameter(net.linear.bias.detach().clone())
    net.linear.bias = new
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    optimizer.state[new] = optimizer.state.pop(old)


Event = Callable[[Net, AdamW], None]
EVENTS: list[Event] = [
    load_checkpoint,
    recreate_state,
    unfreeze,
    freeze,
    toggle_scale,
    rename,
    change_settings,
    replace_groups,
    move_between_groups,
    replace_parameter,
]


def test_metric_follows_each_change_of_the_optimizer() -> None:
    with each_row() as row:
        for event in EVENTS:
            net = Net()
            optimizer, kept = optimizer_of(net), statistics(net)
            with row(event.__name__):
                for change in (None, event, None, event):
                    if change is not None:
                        change(net, optimizer)
                    train(net, optimizer)
                    assert_agrees(kept, net, optimizer)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=8))
def test_metric_follows_any_sequence_of_optimizer_changes(
    events: list[Callable[[Net, AdamW], None]],
) -> None:
    net = Net()
    optimizer, kept = optimizer_of(net), statistics(net)
    train(net, optimizer)
    for event in events:
        event(net, optimizer)
        train(net, optimizer)
        values(kept, optimizer)
    assert_agrees(kept, net, optimizer)


def test_tensors_are_numbered_by_their_current_position() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer, kept = Adam(net.parameters()), statistics()
    train(net, optimizer)
    kept.update(optimizer)
    optimizer.param_groups[0]["params"].pop(0)
    assert values(kept, optimizer) == values(statistics(), optimizer)


def leaves(state: Any) -> Iterator[Any]:
    """Yields the leaves of a state dict; tensors with their version counter."""
    if isinstance(state, dict | list | tuple):
        yield type(state), len(state)
        for each in [*state.items()] if isinstance(state, dict) else state:
            yield from leaves(each)
    elif isinstance(state, Tensor):
        yield id(state), state._version, state.detach().double().numpy().tobytes()
    else:
        yield state


def test_measuring_changes_neither_optimizer_nor_gradients() -> None:
    net = Net()
    optimizer = optimizer_of(net)
    train(net, optimizer)
    unfreeze(net, optimizer)
    untouched = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [untouched], "name": "untouched"})
    assert net.head.weight.grad is not None, "a gradient, but no state yet"

    def everything() -> list[Any]:
        tensors = [(each, each.grad) for each in net.parameters()]
        return [*leaves(optimizer.state_dict()), *leaves([tensors, optimizer.param_groups])]

    before, in_state = everything(), len(optimizer.state)
    metric = statistics(net)
    metric.update(optimizer, histograms=True)
    assert metric.skipped == ["head.weight", "head.bias"]
    assert not any("head" in key for key in metric.compute())
    assert everything() == before
    assert len(optimizer.state) == in_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_nothing_of_the_optimizer_is_kept_alive(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer, metric = Adam([weight]), statistics()
    weight.grad = torch.ones(3, dtype=dtype)
    optimizer.step()
    metric.update(optimizer, histograms=True)
    inside = [weakref.ref(weight.grad), weakref.ref(optimizer.state[weight]["exp_avg"])]
    outside: list[Any] = [weakref.ref(weight), weakref.ref(optimizer)]
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    gc.collect()
    assert [each() for each in inside] == [None, None]
    del weight, optimizer
    gc.collect()
    assert [each() for each in outside] == [None, None]
    assert metric.compute()["adam_gradient/grad_norm"] > 0


def norms(metric: AdamStatistics, scope: str) -> dict[str, float]:
    """Returns the norms of the weights by the name of the scope in the keys."""
    family, name = NORM.split("/")
    keys = re.compile(rf"{family}/{scope}/(.+)/{name}")
    found = {keys.fullmatch(key): value for key, value in metric.compute().items()}
    return {match[1]: value for match, value in found.items() if match}


def members(metric: AdamStatistics, optimizer: Optimizer, scope: str) -> list[str]:
    metric.update(optimizer)
    return list(norms(metric, scope))


NAMES = [name for name, _ in Net().named_parameters()]
POSITIONS = [f"group_0.{position}" for position in range(len(NAMES))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("source", ["module", "optimizer", "positions", "module of the head"])
def test_names_come_from_module_optimizer_or_position(source: str, compiled: bool) -> None:
    net = Net()
    if compiled:
        net.body = torch.compile(net.body, backend="eager")  # type: ignore[assignment]
    optimizer = Adam(net.named_parameters() if source == "optimizer" else net.parameters())
    train(net, optimizer)
    modules: dict[str, nn.Module] = {"module": net, "module of the head": net.head}
    expected = {"positions": POSITIONS, "module of the head": [*POSITIONS[:5], "weight", "bias"]}
    metric = statistics(modules.get(source))
    assert members(metric, optimizer, "tensor") == expected.get(source, NAMES)
    if source == "positions":
        optimizer.param_groups[0]["name"] = "all"
        assert members(metric, optimizer, "tensor")[1] == "all.1"
        assert members(metric, optimizer, "layer") == ["all"]


LAYERS = {
    None: ["root", "body.0", "body.1.0", "head"],
    1: ["root", "body", "head"],
    2: ["root", "body.0", "body.1", "head"],
}
"""Names of the layers by `layer_depth`."""


def test_layer_names_have_layer_depth_parts() -> None:
    with each_row() as row:
        for depth, expected in LAYERS.items():
            net = Net()
            optimizer, metric = Adam(net.parameters()), statistics(net, depth)
            train(net, optimizer)
            with row(depth):
                assert members(metric, optimizer, "layer") == expected
                norm = math.hypot(*norms(metric, "layer").values())
                assert norm == pytest.approx(metric.compute()[NORM])


def test_names_that_differ_only_in_replaced_characters_have_distinct_keys() -> None:
    """Keys cannot contain all characters of names."""
    names = ["a b", "a(b", "a_b", "a_b_"]
    net = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in names})
    weights = list(net.parameters())
    named = zip(names, weights, strict=True)
    optimizer, metric = (
        Adam([{"params": [each], "name": name} for name, each in named]),
        statistics(net),
    )
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    metric.update(optimizer)
    expected = [each.detach().double().norm().item() for each in weights]
    before = {scope: norms(metric, scope) for scope in ("group", "layer", "tensor")}
    for of_scope in before.values():
        assert list(of_scope.values()) == pytest.approx(expected)
    weights[0].grad = None
    metric.update(optimizer)
    assert norms(metric, "group").items() <= before["group"].items(), "the others keep their keys"


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_complex_parameter_is_measured_as_two_real_ones(decoupled: bool, amsgrad: bool) -> None:
    start, grads = torch.randn(3, 4, dtype=torch.complex64), torch.randn(5, 3, 4, 2)
    measured = []
    for is_complex in (True, False):
        weight = nn.Parameter(start.clone() if is_complex else torch.view_as_real(start).clone())
        kind = AdamW if decoupled else Adam
        # Without foreach, torch rounds coupled decay of complex and real numbers differently.
        optimizer = kind([weight], weight_decay=0.1, amsgrad=amsgrad, foreach=True)
        metric = statistics()
        for grad in grads:
            weight.grad = torch.view_as_complex(grad) if is_complex else grad
            optimizer.step()
        metric.update(optimizer, histograms=True)
        measured.append((metric.compute(), metric.compute_exponents()))
    assert measured[0] == measured[1]
    assert_agree(bare(measured[0][0], ""), reference_tensors(optimizer), "numba")


def test_shared_parameter_is_counted_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    optimizer, metric = Adam(net.parameters()), statistics(net)
    train(net, optimizer)
    assert members(metric, optimizer, "tensor") == ["0.weight"]
    assert metric.compute()[NORM] == pytest.approx(first.weight.detach().double().norm().item())
    assert_agree(bare(metric.compute(), ""), reference_tensors(optimizer), "numba")


def test_reused_id_gets_the_name_of_the_new_parameter() -> None:
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    optimizer, reader = Adam(net.parameters()), StateReader(net)
    train(net, optimizer)
    gone = torch.ones(2)
    reader._names = {id(net[0].weight): (weakref.ref(gone), "gone")}
    assert [state.name.tensor for state in reader.after_step(optimizer)] == ["0.weight"]


def test_names_are_read_once_with_parameters_outside_the_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    others = [nn.Parameter(torch.ones(2)) for _ in range(20)]
    optimizer, metric = Adam([*net.parameters(), *others]), statistics(net)
    named, calls = nn.Module.named_parameters, list[nn.Module]()

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return named(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_parameters", spy)
    for _ in range(3):
        net(torch.randn(5, 4)).square().mean().backward()
        for other in others:
            other.grad = torch.ones(2)
        optimizer.step()
        metric.update(optimizer)
    assert calls.count(net) == 1
    assert "adam_weight_decay/tensor/group_0.7/weight_norm" in metric.compute()


def test_layout_of_an_unchanged_state_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer, reader = optimizer_of(net), StateReader(net)
    layouts = []
    for change in (None, None, toggle_scale, toggle_scale, recreate_state, None):
        if change is not None:
            change(net, optimizer)
        train(net, optimizer)
        layouts.append(reader.after_step(optimizer).layout)
    assert layouts[0] is layouts[1], "only the gradients are new"
    assert len({*layouts}) == 4
    assert layouts[4] is layouts[5]


def move_data(net: Net, optimizer: AdamW) -> None:
    net.linear.weight.data = net.linear.weight.data.clone()


def move_moment(net: Net, optimizer: AdamW) -> None:
    moment = optimizer.state[net.linear.weight]["exp_avg"]
    moment.data = moment.data * 1.0


def move_step(net: Net, optimizer: AdamW) -> None:
    step = optimizer.state[net.linear.weight]["step"]
    step.data = step.data + 0.0


def gradient_in_other_order(net: Net, optimizer: AdamW) -> None:
    weight = net.linear.weight
    assert weight.grad is not None
    weight.grad = weight.grad.t().contiguous().t()


def gradient_in_float64(net: Net, optimizer: AdamW) -> None:
    weight = net.linear.weight
    assert weight.grad is not None
    weight.grad_dtype = None
    weight.grad = weight.grad.double()


def test_replaced_memory_is_read_again() -> None:
    """The tensor objects are the same, but their addresses change."""
    changes = (move_data, move_moment, move_step, gradient_in_other_order, gradient_in_float64)
    with each_row() as row:
        for change in changes:
            net = Net()
            optimizer, kept = optimizer_of(net), statistics(net)
            train(net, optimizer)
            kept.update(optimizer)
            for _ in range(2):
                change(net, optimizer)
                with row(change.__name__):
                    assert_agrees(kept, net, optimizer)
