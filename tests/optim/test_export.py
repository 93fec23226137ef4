"""A module with the mixin can be exported, copied and pickled before and after a fit."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.support.tables import each_row
from tests.support.training import ADAMW, Lit, loader, trainer

LINEAR = {"name": "linear"}
EXPONENTIAL = {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.9}
HEAD = {**ADAMW, "groups": [{"name": "head", "match": "net.3.*", "lr_scale": 10}]}


class Exportable(Lit):
    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.example_input_array = torch.ones(2, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs


class WithHparams(Exportable):
    def __init__(self, optimizer: Any = None, scheduler: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    torch.save(module, "module.pt")
    return torch.load("module.pt", weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "script": lambda module: module.to_torchscript(),
    "trace": lambda module: module.to_torchscript(method="trace"),
    "export": lambda module: torch.export.export(module, (torch.ones(2, 6),)).module(),
    "compile": lambda module: torch.compile(module, backend="eager"),
    "deepcopy": deepcopy,
    "pickle": pickled,
    "save": saved,
}
FORMS: dict[str, Callable[[], Any]] = {
    "nothing": Exportable,
    "dicts": lambda: Exportable(HEAD, LINEAR),
    "nodes": lambda: Exportable(OmegaConf.create(HEAD), OmegaConf.create(EXPONENTIAL)),
    "hyperparameters": lambda: WithHparams(OmegaConf.create(HEAD), OmegaConf.create(LINEAR)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("is_fitted", [False, True])
def test_module_is_exported_copied_and_pickled(
    is_fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = torch.ones(2, 6)
    with each_row() as row:
        for form, make in FORMS.items():
            if is_fitted and form == "nothing":
                continue
            module = make()
            if is_fitted:
                trainer(max_epochs=1).fit(module, loader(2))
            module.eval()
            expected = module(inputs)
            for way, convert in WAYS.items():
                with row((form, way)):
                    torch.testing.assert_close(convert(module)(inputs), expected)


def test_copies_train_like_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with each_row() as row:
        for form, make in FORMS.items():
            if form == "nothing":
                continue
            for copied in (deepcopy, pickled, saved):
                with row((form, copied.__name__)):
                    module = make()
                    trainer(max_epochs=1).fit(module, loader(2))
                    copy = copied(module)
                    for each in (module, copy):
                        trainer(max_epochs=1).fit(each, loader(2))
                    pairs = zip(module.parameters(), copy.parameters(), strict=True)
                    assert all(torch.equal(one, other) for one, other in pairs)
