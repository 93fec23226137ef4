"""Parsing of logged keys: every key of AdamMonitor, and those of others."""

import itertools
from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_adam import AdamMonitor
from lightning_adam.dashboard.keys import BASES, Key, Scope, read_key
from lightning_adam.dashboard.runs import read_runs
from lightning_adam.schema import Scope as MeasuredScope
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.dashboard.conftest import UNDEFINED, LoggedRun
from tests.support.tables import each_row
from tests.support.training import loader, loss_of, network, trainer

FEW_EXAMPLES = settings(max_examples=50, deadline=None)
PARTS = (["one"], ["one", "two"], ["layer", "group"], ["images/one", "images/two"])
GROUP_NAMES = (["a.b", "c/d"], ["group/layer/x", "optimizer/y"])
FOREIGN_KEYS = (
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
)
SHOWN_SCOPES = [
    (Scope(), "model", False),
    (Scope("gan"), "gan", False),
    (Scope("", "group", "decay"), "decay", False),
    (Scope("gan", "group", "decay"), "gan: decay", False),
    (Scope("", "layer", "net.0"), "net.0", True),
    (Scope("gan", "tensor", "net.0.bias"), "gan: net.0.bias", True),
]
"""Scopes, how they are shown, and whether they are layers or tensors."""
GROUPS = {"net.head": ["net.3.weight"], "net.head_no_decay": ["net.3.bias"]}


def full_key(key: Key) -> str:
    """Puts a parsed key together again."""
    optimizer = f"/optimizer/{key.scope.optimizer}" if key.scope.optimizer else ""
    inner = f"/{key.scope.kind}/{key.scope.name}" if key.scope.kind else ""
    return key.base + optimizer + inner


def scopes_of(keys: Iterable[str]) -> set[Scope]:
    """Returns the scopes of keys, all of which AdamMonitor has logged."""
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


def test_every_logged_key_is_parsed(logged_run: LoggedRun) -> None:
    for folder in logged_run:
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
    (run,) = read_runs([logged_run.wandb])
    assert {read_key(key).base for key in run.histograms} == {
        f"adam_histogram/{quantity}" for quantity in QUANTITIES
    }
    assert len(scopes_of(run.histograms)) == 5


class Parts(L.LightningModule):
    """One optimizer for each part, with two named groups."""

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
def test_names_may_contain_dots_slashes_and_reserved_words() -> None:
    with each_row() as row:
        for parts, groups in itertools.product(PARTS, GROUP_NAMES):
            with row((parts, groups)):
                monitor = AdamMonitor(1, list(MeasuredScope), ["grad_norm", "lr"])
                fit = trainer(max_epochs=1, callbacks=[monitor])
                fit.fit(Parts(parts, groups), loader(1))
                assert scopes_of(fit.callback_metrics) == expected_scopes(parts, groups)


def expected_scopes(parts: list[str], groups: list[str]) -> set[Scope]:
    scopes = set()
    for part in parts:
        optimizer = f"parts.{part}" if len(parts) > 1 else ""
        layers = [f"parts.{part}.{place}" for place in (0, 3)]
        tensors = [f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")]
        scopes.add(Scope(optimizer))
        for kind, names in {"group": groups, "layer": layers, "tensor": tensors}.items():
            scopes.update(Scope(optimizer, kind, name) for name in names)
    return scopes


NAMES = st.from_regex(r"[A-Za-z0-9_.]+(/[A-Za-z0-9_.]+)?", fullmatch=True)


@FEW_EXAMPLES
@given(
    st.sampled_from(sorted(BASES)),
    st.just("") | st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True),
    st.just(("", "")) | st.tuples(st.sampled_from(["group", "layer", "tensor"]), NAMES),
)
def test_parsed_key_is_the_one_that_was_put_together(
    base: str, optimizer: str, inner: tuple[str, str]
) -> None:
    expected = Key(base, BASES[base], Scope(optimizer, *inner))
    assert read_key(full_key(expected)) == expected


def test_foreign_key_is_kept_as_it_is() -> None:
    assert {key: read_key(key) for key in FOREIGN_KEYS} == {
        key: Key(key, None, Scope()) for key in FOREIGN_KEYS
    }


def test_scope_is_shown_by_its_name_and_knows_whether_it_is_inside_the_model() -> None:
    assert [(scope, str(scope), scope.is_inner) for scope, *_ in SHOWN_SCOPES] == SHOWN_SCOPES
