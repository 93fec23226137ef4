"""The settings of AdamMonitor: the keys each of them logs, and the invalid values."""

from typing import Any

import pytest
import torch

from lightning_adam import AdamMonitor, ConfigError
from lightning_adam.statistics import kernels
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.kernels import eager, numba
from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, network, run_training

GRAD_NORM = STATISTICS["grad_norm"].key
LAYERS = ("net.0", "net.1", "net.3")


def logged_keys(**settings: Any) -> set[str]:
    run = run_training(Lit(ADAMW), AdamMonitor(1, **settings), data=1)
    (row,) = (row for _, row in run.logger.rows if any(key.startswith("adam_") for key in row))
    return {key for key in row if key.startswith("adam_")}


def test_scopes_and_statistics_select_the_keys() -> None:
    names = [name for name, _ in network().named_parameters(prefix="net")]
    scopes = [f"layer/{layer}" for layer in LAYERS] + [f"tensor/{name}" for name in names]
    expected = {
        f"adam_underflow/{scope}/{name}"
        for name in ("eps_dominated_fraction", "eps_damping", "eps_energy_loss")
        for scope in scopes
    }
    assert logged_keys(scopes=["layer", "tensor"], statistics=["eps_*"]) == expected


def test_layer_depth_joins_layers() -> None:
    settings = {"scopes": ["layer"], "layer_depth": 1, "statistics": "grad_norm"}
    assert logged_keys(**settings) == {"adam_gradient/layer/net/grad_norm"}


def test_worst_selects_the_tensors_with_the_largest_values_at_each_step() -> None:
    class KeepNorms(Lit):
        norms: list[dict[str, float]]

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            tensors = [(name, tensor.grad) for name, tensor in self.named_parameters()]
            self.norms.append(
                {name: grad.double().norm().item() for name, grad in tensors if grad is not None}
            )

    module = KeepNorms({**ADAMW, "lr": 0.1})
    module.norms = []
    monitor = AdamMonitor(2, scopes=["model"], statistics="lr", worst={"grad_norm": 2})
    run = run_training(module, monitor, data=40)
    rows = {step: row for step, row in run.logger.rows if "adam_schedule/lr" in row}
    assert list(rows) == [0, *range(1, 40, 2)]
    shown = set()
    for step, row in rows.items():
        assert step is not None
        norms = module.norms[step]
        worst = sorted(norms, key=norms.__getitem__)[-2:]
        keys = [f"adam_gradient/worst_{rank}/grad_norm" for rank in (2, 1)]
        values = {key: norms[name] for key, name in zip(keys, worst, strict=True)}
        texts: dict[str, Any] = {key: row.pop(key) for key in [*row] if key.endswith("_tensor")}
        assert row == pytest.approx({"adam_schedule/lr": 0.1, **values}, rel=1e-6)
        assert texts == {f"{key}_tensor": name for key, name in zip(keys, worst, strict=True)}
        shown.add(frozenset(worst))
    assert len(shown) > 1, "the worst tensors change during the run"


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"every_n_steps": 0}, r"^every_n_steps=0 must be at least 1\. Use .* every_n_steps=50$"),
    (
        {"statistics": ["grad_nrom"]},
        r"^statistics=\['grad_nrom'\] matches no statistic: .*statistics=\['grad_norm'\]$",
    ),
    ({"worst": {"grad_nrm": 1}}, r"^worst\.grad_nrm=1 is not .* worst\.grad_norm=1$"),
    ({"worst": {"grad_norm": 0}}, r"^worst\.grad_norm=0 must be at least 1.* worst\.grad_norm=5$"),
    ({"layer_depth": 0}, r"^layer_depth=0 must be at least 1\. Use .* layer_depth=2$"),
    (
        {"histograms_every_n_steps": 0},
        r"^histograms_every_n_steps=0 must be at least 1\. Use .* histograms_every_n_steps=500$",
    ),
    ({"scopes": "layer"}, r"^scopes='layer' must be a list\. .* scopes=\['model'\]$"),
    ({"scopes": None}, r"^scopes=None must be a list\. .* scopes=\['model'\]$"),
    ({"statistics": None}, r"^statistics=None must be headline, all, or a list"),
    ({"statistics": {"a": 1}}, r"^statistics=\{'a': 1\} must be headline, all, or a list"),
    ({"worst": ["grad_norm"]}, r"^worst=\['grad_norm'\] must be a dictionary\."),
    ({"worst": "grad_norm"}, r"^worst='grad_norm' must be a dictionary\."),
    (
        {"scopes": ["tensors"]},
        r"^scopes=\['tensors'\] has 'tensors', which must be 'model', 'group', 'layer' or"
        r" 'tensor'\. .* scopes=\['tensor'\]$",
    ),
    ({"kernel": "nunba"}, r"^kernel='nunba' must be 'auto', .* kernel='numba'$"),
]


def test_invalid_arguments_raise_at_construction() -> None:
    with each_row() as row:
        for settings, sentence in BAD_SETTINGS:
            with row(settings), pytest.raises(ConfigError, match=sentence):
                AdamMonitor(**settings)


@pytest.mark.parametrize(
    ("kernel", "install"), [("numba", r"'lightning-adam\[cpu\]'"), ("triton", "'triton>=3.6'")]
)
def test_kernel_that_is_not_installed_raises_at_construction(
    kernel: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_adam.statistics.selection.find_spec", lambda package: None)
    sentence = (
        rf"^kernel='{kernel}' is not installed: pip install {install}\. Use for example"
        r" kernel='auto'$"
    )
    with pytest.raises(ConfigError, match=sentence):
        AdamMonitor(kernel=kernel)


def test_kernel_that_cannot_be_imported_raises_when_fit_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_adam.monitor.preconditions.is_installed", lambda kernel: False)
    sentence = (
        r"^kernel='numba' does not work here: pip install --upgrade 'lightning-adam\[cpu\]'\. Use"
        r" for example kernel='auto'$"
    )
    with pytest.raises(ConfigError, match=sentence):
        run_training(Lit(ADAMW), AdamMonitor(1, kernel="numba"), data=1)


def test_kernel_for_another_device_raises_when_fit_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_adam.statistics.selection.find_spec", lambda package: True)
    monkeypatch.setattr("lightning_adam.monitor.preconditions.is_installed", lambda kernel: True)
    sentence = (
        r"^kernel='triton' does not support the device of the parameters, cpu\. Use for example"
        r" kernel='auto'$"
    )
    with pytest.raises(ConfigError, match=sentence):
        run_training(Lit(ADAMW), AdamMonitor(1, kernel="triton"), data=1)


@pytest.mark.parametrize("kernel", ["numba", "eager"])
def test_requested_kernel_measures(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def spy(name: str, measure: Any) -> Any:
        def spied(*arguments: Any) -> Any:
            used.append(name)
            return measure(*arguments)

        return spied

    for name, module in (("numba", numba), ("eager", eager)):
        monkeypatch.setattr(module, "measure", spy(name, module.measure))
    run_training(Lit(ADAMW), AdamMonitor(1, kernel=kernel), data=2)
    assert used == [kernel, kernel]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_compilation_is_announced_once(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.preconditions.log_info", lines.append)
    monkeypatch.setattr(numba, "is_compiled", lambda: is_compiled)
    run_training(Lit(ADAMW), AdamMonitor(1), data=2)
    expected = ["AdamMonitor compiles its CPU kernel once; this takes about 10 s."]
    assert lines == ([] if is_compiled else expected)


def test_one_line_is_logged_with_the_command_that_installs_the_fast_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_adam.monitor.preconditions.log_info", lines.append)
    monkeypatch.setattr(kernels, "is_installed", lambda kernel: False)
    run = run_training(Lit(ADAMW), AdamMonitor(1), data=3)
    assert lines == [
        "AdamMonitor measures AdamW many times faster with numba: pip install 'lightning-adam[cpu]'"
    ]
    assert run.steps_of(GRAD_NORM) == [0, 1, 2]
