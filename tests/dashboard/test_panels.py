"""The panels are whole: each statistic has one, and each finds its keys."""

import itertools
import re

import pytest

from lightning_adam.dashboard.panels import SECTIONS, Drawing, Panel
from lightning_adam.statistics.catalogue import STATISTICS, Statistic, select
from lightning_adam.statistics.histograms import QUANTITIES

PANELS = list(itertools.chain.from_iterable(SECTIONS.values()))
FAMILIES = {
    "moments": "Moments",
    "underflow": "Underflow",
    "update": "Update",
    "weight_decay": "Weight decay",
    "schedule": "Schedule",
}
MATTER = {
    "Overview": ["loss", "validation metric", "lr"],
    "Moments": ["exp_avg_sq_lag"],
    "Underflow": ["eps_energy_loss", "eps_curve", "√v̂ histogram"],
    "Update": ["update_to_weight"],
    "Weight decay": ["decay_to_update"],
    "Layers": ["layers", "before it blew up"],
    "Schedule": [],
}


def titled(title: str) -> Panel:
    (panel,) = (panel for panel in PANELS if panel.title == title)
    return panel


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_every_statistic_has_one_panel_of_its_own(statistic: Statistic) -> None:
    drawn = [
        (section, panel)
        for section, panels in SECTIONS.items()
        for panel in panels
        if panel.draws(statistic.key) and panel.drawing is Drawing.CURVES
    ]
    ((section, panel),) = drawn
    assert section == ("Overview" if statistic.name == "lr" else FAMILIES[statistic.family])
    of_layers = [titled("layers"), titled("before it blew up")]
    assert [each for each in PANELS if each.draws(statistic.key)] == sorted(
        [panel, *of_layers], key=PANELS.index
    )
    assert (panel.title, panel.meaning) == (statistic.name, statistic.meaning)
    assert (panel.definition, panel.unit) == (statistic.formula, statistic.unit)
    assert panel.source == statistic.source
    asked = f"adam_monitor.statistics=[headline,{statistic.name}]"
    assert panel.absent == f"Not logged; type for example '{asked}'"


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_quantity_that_is_counted_is_drawn(quantity: str) -> None:
    drawings = [panel.drawing for panel in PANELS if panel.draws(f"adam_histogram/{quantity}")]
    expected = [Drawing.EPS_CURVE] if quantity == "denominator" else []
    assert drawings == [*expected, Drawing.HISTOGRAM]


def test_eleven_panels_matter_and_stand_first_in_their_sections() -> None:
    assert sum(map(len, MATTER.values())) == 11
    assert list(SECTIONS) == list(MATTER)
    for section, panels in SECTIONS.items():
        matter = MATTER[section]
        assert [panel.title for panel in panels if panel.matters] == matter
        assert [panel.title for panel in panels[: len(matter)]] == matter
        names = [each.name for each in STATISTICS.values() if FAMILIES[each.family] == section]
        others = [panel.title for panel in panels[len(matter) :]]
        assert others == [name for name in names if name not in {*matter, "lr"}]


def test_every_panel_explains_itself() -> None:
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel.meaning.endswith(".")
        assert panel.absent
        assert not panel.absent.endswith("."), "the page ends the sentence"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_its_keys_are_an_expression_that_wandb_reads(panel: Panel) -> None:
    """W&B has no lookaround and no backreferences; a group of its own is put around them."""
    assert not re.search(r"\(\?|\\[0-9]", panel.keys)
    assert re.compile(f"^({panel.keys})$")


@pytest.mark.parametrize("statistic", select(["headline"]), ids=lambda each: each.name)
def test_a_panel_does_not_draw_what_only_resembles_its_key(statistic: Statistic) -> None:
    (panel,) = (each for each in PANELS if each.title == statistic.name)
    for key in (f"{statistic.key}s", f"my/{statistic.key}", statistic.name, statistic.key[:-1]):
        assert not panel.draws(key)


@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "train_loss",
        "train/loss",
        "train/loss_step",
        "train_loss_epoch",
        "training_loss_step",
        "training/total_loss",
        "loss_step",
        "loss_epoch",
    ],
)
def test_what_is_a_loss(key: str) -> None:
    assert [panel.title for panel in PANELS if panel.draws(key)] == ["loss"]


@pytest.mark.parametrize(
    "key",
    ["val/loss", "val_loss", "valid_acc", "valid/f1", "validation/f1", "val_acc/dataloader_idx_0"],
)
def test_what_is_a_validation_metric(key: str) -> None:
    assert [panel.title for panel in PANELS if panel.draws(key)] == ["validation metric"]


@pytest.mark.parametrize(
    "key",
    [
        "value_loss",
        "value/loss",
        "valuation_acc",
        "loss_scale",
        "train/loss_scale",
        "train/accuracy",
        "lossy",
        "closs",
        "test/loss",
        "interval/x",
        "lr-AdamW",
        "adam_layers.nrows",
        "",
    ],
)
def test_what_is_neither(key: str) -> None:
    assert [panel.title for panel in PANELS if panel.draws(key)] == []
