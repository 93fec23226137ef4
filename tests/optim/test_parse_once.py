"""A fit parses each config once."""

from collections import Counter
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_adam import AdamMonitor, build_adam
from lightning_adam.config import monitor, optimizer, schedule
from lightning_adam.config.parsing import validate
from tests.support.tables import each_row
from tests.support.training import Lit, network, run_training

OPTIMIZER = {"lr": 0.01, "groups": [{"name": "head", "match": "*weight"}]}
SCHEDULER = {"name": "cosine", "warmup_steps": 1}


class FromHyperparameters(Lit):
    """Has its configs only in `self.hparams`."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        super().__init__(None)
        self.save_hyperparameters()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each dataclass is built from values."""
    counts: Counter[str] = Counter()

    def counting(schema: Any, values: Any, path: Any) -> Any:
        counts[schema.__name__] += 1
        return validate(schema, values, path)

    for module in (monitor, optimizer, schedule):
        monkeypatch.setattr(module, "validate", counting)
    return counts


def test_each_config_is_parsed_once_from_construction_to_the_end_of_a_fit(
    parsed: Counter[str],
) -> None:
    composed = OmegaConf.create({"model": {"optimizer": OPTIMIZER, "scheduler": SCHEDULER}}).model
    with each_row() as row:
        for kind in (Lit, FromHyperparameters):
            for node in ({"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, composed):
                with row(f"{kind.__name__}, {type(node).__name__}"):
                    parsed.clear()
                    run_training(kind(node["optimizer"], node["scheduler"]), data=2)
                    assert parsed == {"AdamConfig": 1, "CosineConfig": 1}


def test_build_adam_parses_each_config_once(parsed: Counter[str]) -> None:
    build_adam(network(), OPTIMIZER, SCHEDULER, 10)
    assert parsed == {"AdamConfig": 1, "CosineConfig": 1}


def test_monitor_parses_its_arguments_once(parsed: Counter[str]) -> None:
    AdamMonitor(every_n_steps=1)
    assert parsed == {"MonitorConfig": 1}
