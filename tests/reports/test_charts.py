"""The panels of the report: every statistic has one, and each finds its keys."""

import itertools
import re

from lightning_adam.reports.panels import SECTIONS, Drawing, Panel
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.histograms import QUANTITIES
from tests.support.tables import each_row

PANELS = list(itertools.chain.from_iterable(SECTIONS.values()))
FAMILIES = {
    "gradient": "Gradient",
    "moments": "Moments",
    "underflow": "Underflow",
    "update": "Update",
    "weight_decay": "Weight decay",
    "schedule": "Schedule",
}
FIRST_PANELS = {
    "Overview": ["loss", "validation metric", "lr"],
    "Gradient": ["grad_norm"],
    "Moments": ["rms_ratio"],
    "Underflow": ["eps_energy_loss", "eps_curve", "√v̂ histogram"],
    "Update": ["update_to_weight"],
    "Weight decay": ["decay_to_update"],
    "Layers": ["layers", "before it blew up"],
    "Schedule": [],
}
PERCENTILES = {"Moments": "denominator", "Update": "normalized_update"}
"""Quantities whose percentiles are drawn in a section."""
FOREIGN_KEYS = {
    "loss": ["loss", "train/loss", "train_loss_epoch", "training/total_loss", "loss_step"],
    "validation metric": ["val/loss", "valid_acc", "validation/f1", "val_acc/dataloader_idx_0"],
    "": ["value_loss", "train/loss_scale", "train/accuracy", "lossy", "closs", "test/loss", ""],
}
"""Keys that a module logs itself, by the panel that draws them."""


def panels_of(key: str) -> list[Panel]:
    return [panel for panel in PANELS if panel.draws(key)]


def titles_of(key: str) -> list[str]:
    return [panel.title for panel in panels_of(key)]


def test_every_statistic_has_one_panel_with_its_explanation() -> None:
    sections = {panel.title: section for section, panels in SECTIONS.items() for panel in panels}
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                panels = panels_of(statistic.key)
                (panel,) = (each for each in panels if each.drawing is Drawing.CURVES)
                others = [each.title for each in panels if each is not panel]
                assert others == FIRST_PANELS["Layers"]
                family = "Overview" if name == "lr" else FAMILIES[statistic.family]
                assert sections[panel.title] == family
                assert (panel.title, panel.meaning) == (name, statistic.meaning)
                assert (panel.definition, panel.unit) == (statistic.formula, statistic.unit)
                assert panel.source == statistic.source
                override = f"adam_monitor.statistics=[headline,{name}]"
                assert panel.absent == f"Not logged. Set '{override}'"
                for similar in (f"{statistic.key}s", f"my/{statistic.key}", statistic.key[:-1]):
                    assert not panel.draws(similar)
                assert not panel.draws(name)


def test_every_histogram_is_drawn_and_that_of_denominators_as_a_curve_too() -> None:
    assert {quantity: titles_of(f"adam_histogram/{quantity}") for quantity in QUANTITIES} == {
        quantity: ["eps_curve"] * (quantity == "denominator") + ["√v̂ histogram"]
        for quantity in QUANTITIES
    }


def test_percentiles_of_a_quantity_share_a_panel() -> None:
    for section, quantity in PERCENTILES.items():
        for percent in (1, 50, 99):
            key = f"adam_{section.lower()}/{quantity}_p{percent}"
            assert titles_of(key) == [f"{quantity} percentiles"]


def test_most_important_panels_are_first_in_their_sections() -> None:
    assert list(SECTIONS) == list(FIRST_PANELS)
    for section, panels in SECTIONS.items():
        first = FIRST_PANELS[section]
        assert [panel.title for panel in panels if panel.matters] == first
        assert [panel.title for panel in panels[: len(first)]] == first
        names = [each.name for each in STATISTICS.values() if FAMILIES[each.family] == section]
        others = [panel.title for panel in panels[len(first) :]]
        names += [f"{PERCENTILES[section]} percentiles"] if section in PERCENTILES else []
        assert others == [name for name in names if name not in {*first, "lr"}]


def test_every_panel_has_its_own_title_an_explanation_and_keys_that_wandb_can_read() -> None:
    """W&B has no lookaround and no backreferences, and puts a group around the expression."""
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    with each_row() as row:
        for panel in PANELS:
            with row(panel.title):
                assert panel.meaning.endswith(".")
                assert panel.absent
                assert not panel.absent.endswith("."), "the page ends the sentence"
                assert not re.search(r"\(\?|\\[0-9]", panel.keys)
                assert re.compile(f"^({panel.keys})$")


def test_losses_and_validation_metrics_are_recognized_by_their_keys() -> None:
    with each_row() as row:
        for title, keys in FOREIGN_KEYS.items():
            for key in keys:
                with row(key):
                    assert titles_of(key) == ([title] if title else [])
