"""A logged key taken apart: every key that AdamMonitor logs, and those of others."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_adam import AdamMonitor
from lightning_adam.dashboard.keys import BASES, Key, Scope, read_key
from lightning_adam.dashboard.runs import read_runs
from lightning_adam.schema import Scope as MeasuredScope
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.dashboard.conftest import UNDEFINED, Trained
from tests.support.training import loader, loss_of, network, trainer

GROUPS = {"net.head": ["net.3.weight"], "net.head_no_decay": ["net.3.bias"]}


def full_key(key: Key) -> str:
    """What a key was before it was taken apart."""
    optimizer = f"/optimizer/{key.scope.optimizer}" if key.scope.optimizer else ""
    inner = f"/{key.scope.kind}/{key.scope.name}" if key.scope.kind else ""
    return key.base + optimizer + inner


def scopes_of(keys: Iterable[str]) -> set[Scope]:
    """The scopes of keys, all of which are ours."""
    scopes = set()
    for key in keys:
        found = read_key(key)
        assert full_key(found) == key
        assert found.base in BASES
        if found.statistic is None:
            assert found.base.removeprefix("adam_histogram/") in QUANTITIES
        else:
            assert found.statistic.key == found.base
        scopes.add(found.scope)
    return scopes


def test_every_key_of_a_run_is_read(trained: Trained) -> None:
    for folder in trained:
        (run,) = read_runs([folder])
        ours = [key for key in run.series if key.startswith("adam_")]
        places = ("adam_layers.", "adam_findings.", "adam_underflow/eps_c")
        tables = [key for key in ours if key.startswith(places)]
        keys = set(ours) - set(tables)
        names = [f"net.{place}.{part}" for place in (0, 1, 3) for part in ("weight", "bias")]
        assert scopes_of(keys) == {
            Scope(),
            *(Scope("", "group", name) for name in ("decay", "no_decay", *GROUPS)),
            *(Scope("", "layer", f"net.{place}") for place in (0, 1, 3)),
            *(Scope("", "tensor", name) for name in names),
        }
        measured = {read_key(key).statistic for key in keys}
        assert {each.name for each in measured if each} == STATISTICS.keys() - UNDEFINED
    (run,) = read_runs([trained.wandb])
    assert {read_key(key).base for key in run.histograms} == {
        f"adam_histogram/{quantity}" for quantity in QUANTITIES
    }
    assert len(scopes_of(run.histograms)) == 5


class Parts(L.LightningModule):
    """Several optimizers for parts of these names, of which each has two groups."""

    def __init__(self, parts: list[str], groups: list[str]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleDict({part: network() for part in parts})
        self.groups = groups

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(
                [
                    {"name": name, "params": [*layer.parameters()]}
                    for name, layer in zip(self.groups, (net[0], net[3]), strict=True)
                ]
            )
            for net in self.parts.values()
            if isinstance(net, nn.Sequential)
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer, net in zip(optimizers, self.parts.values(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, batch))
            optimizer.step()


@pytest.mark.filterwarnings("ignore:AdamMonitor has no logger")
@pytest.mark.parametrize("groups", [["a.b", "c/d"], ["group/layer/x", "optimizer/y"]])
@pytest.mark.parametrize(
    "parts", [["one"], ["one", "two"], ["layer", "group"], ["images/one", "images/two"]]
)
def test_names_may_hold_dots_slashes_and_our_own_words(parts: list[str], groups: list[str]) -> None:
    scopes = list(MeasuredScope)
    fit = trainer(max_epochs=1, callbacks=[AdamMonitor(1, scopes, ["grad_norm", "lr"])])
    fit.fit(Parts(parts, groups), loader(1))
    optimizers = [f"parts.{part}" for part in parts] if len(parts) > 1 else [""]
    assert scopes_of(fit.callback_metrics) == {
        Scope(optimizer, kind, name)
        for part, optimizer in zip(parts, optimizers, strict=True)
        for kind, names in {
            "": [""],
            "group": groups,
            "layer": [f"parts.{part}.{place}" for place in (0, 3)],
            "tensor": [
                f"parts.{part}.{place}.{tensor}"
                for place in (0, 3)
                for tensor in ("weight", "bias")
            ],
        }.items()
        for name in names
    }


NAMES = st.from_regex(r"[A-Za-z0-9_.]+(/[A-Za-z0-9_.]+)?", fullmatch=True)


@given(
    st.sampled_from(sorted(BASES)),
    st.just("") | st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True),
    st.just(("", "")) | st.tuples(st.sampled_from(["group", "layer", "tensor"]), NAMES),
)
def test_a_key_is_read_as_it_was_put_together(
    base: str, optimizer: str, inner: tuple[str, str]
) -> None:
    expected = Key(base, BASES[base], Scope(optimizer, *inner))
    assert read_key(full_key(expected)) == expected


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "loss",
        "train/loss",
        "train/loss/group/decay",
        "lr-Adam",
        "adam_layers",
        "adam_layers.nrows",
        "adam_update",
        "adam_update/",
        "adam_update/unknown",
        "adam_update/update_norm/",
        "adam_update/update_norm/group",
        "adam_update/update_norm/group/",
        "adam_update/update_norm/module/net",
        "adam_update/update_norm/optimizer/",
        "adam_update/update_norms",
        "my_adam_update/update_norm",
        "adam_underflow/eps_curve_table.nrows",
    ],
)
def test_a_key_that_is_not_ours_is_left_whole(key: str) -> None:
    assert read_key(key) == Key(key, None, Scope())


@pytest.mark.parametrize(
    ("scope", "shown", "is_inner"),
    [
        (Scope(), "model", False),
        (Scope("gan"), "gan", False),
        (Scope("", "group", "decay"), "decay", False),
        (Scope("gan", "group", "decay"), "gan: decay", False),
        (Scope("", "layer", "net.0"), "net.0", True),
        (Scope("gan", "tensor", "net.0.bias"), "gan: net.0.bias", True),
    ],
)
def test_how_a_scope_is_called(scope: Scope, shown: str, is_inner: bool) -> None:
    assert str(scope) == shown
    assert scope.is_inner is is_inner
