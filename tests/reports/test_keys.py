"""Parsing of logged keys of AdamMonitor and of the module."""

from collections.abc import Iterable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_adam.reports.keys import BASES, Key, Scope, read_key
from lightning_adam.reports.runs import read_runs
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.reports.conftest import UNDEFINED, LoggedRun

FOREIGN_KEYS = (
    "",
    "train/group/decay/loss",
    "adam_layers.nrows",
    "adam_update",
    "adam_update/unknown",
    "adam_update/group/update_norm",
    "adam_update/group//update_norm",
    "adam_update/group/a/b/update_norm",
    "adam_update/module/net/update_norm",
    "adam_update/optimizer//update_norm",
    "adam_update/group/decay/optimizer/gan/update_norm",
    "adam_update/worst/update_norm",
    "adam_update/worst_x/update_norm",
    "adam_update/worst_1/update_norm_tensor",
    "adam_update/update_norm/group/decay",
    "adam_update/update_norms",
    "my_adam_update/update_norm",
)
SHOWN_SCOPES = [
    (Scope(), "model", False),
    (Scope("gan"), "gan", False),
    (Scope("", "group", "decay"), "decay", False),
    (Scope("gan", "group", "decay"), "gan: decay", False),
    (Scope("", "layer", "net.0"), "net.0", True),
    (Scope("gan", "tensor", "net.0.bias"), "gan: net.0.bias", True),
    (Scope("gan", "worst", "2"), "gan: worst 2", False),
]
"""Scopes, their labels, and whether they are layers or tensors."""


def full_key(key: Key) -> str:
    optimizer, kind, name = key.scope
    family, _, statistic = key.base.partition("/")
    between = "_" if kind == "worst" else "/"
    scope = f"optimizer/{optimizer}/" if optimizer else ""
    scope += f"{kind}{between}{name}/" if kind else ""
    return f"{family}/{scope}{statistic}"


def scopes_of(keys: Iterable[str]) -> set[Scope]:
    """Returns the scopes of keys of AdamMonitor."""
    scopes = set()
    for key in keys:
        found = read_key(key)
        assert full_key(found) == key
        assert found.base in BASES
        if found.statistic is not None:
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
            *(
                Scope("", "group", name)
                for name in ("decay", "no_decay", "net.head", "net.head_no_decay")
            ),
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


NAMES = st.from_regex(r"[A-Za-z0-9_.]+", fullmatch=True)
SCOPES = st.one_of(
    st.just(("", "")),
    st.tuples(st.sampled_from(["group", "layer", "tensor"]), NAMES),
    st.tuples(st.just("worst"), st.from_regex("[1-9][0-9]?", fullmatch=True)),
)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(BASES)),
    st.just("") | NAMES,
    SCOPES,
)
@example("adam_gradient/grad_norm", "", ("group", "layer"))
@example("adam_gradient/grad_norm", "group", ("layer", "optimizer"))
@example("adam_gradient/grad_norm", "", ("group", "worst_1"))
@example("adam_gradient/grad_norm", "parts.group", ("tensor", "parts.group.0.weight"))
def test_parsed_key_has_the_parts_of_the_key(
    base: str, optimizer: str, inner: tuple[str, str]
) -> None:
    expected = Key(base, BASES[base], Scope(optimizer, *inner))
    assert read_key(full_key(expected)) == expected


def test_foreign_key_is_unchanged() -> None:
    assert {key: read_key(key) for key in FOREIGN_KEYS} == {
        key: Key(key, None, Scope()) for key in FOREIGN_KEYS
    }


def test_label_of_a_scope_and_whether_it_is_a_layer_or_tensor() -> None:
    assert [(scope, str(scope), scope.is_inner) for scope, *_ in SHOWN_SCOPES] == SHOWN_SCOPES
