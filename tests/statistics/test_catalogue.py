"""The catalogue of statistics: keys, explanations and columns."""

import re

from lightning_adam.statistics.catalogue import STATISTICS, select
from lightning_adam.statistics.columns import ACCUMULATORS, COLUMNS, DERIVED, GIVEN, sources_of
from tests.support.tables import each_row

PROMISED = {
    "gradient": "grad_norm* grad_rms grad_max grad_zero_fraction grad_norm_before_clip*"
    " clip_coefficient* loss_scale",
    "moments": "exp_avg_rms* exp_avg_mean exp_avg_max exp_avg_sq_mean* exp_avg_sq_max"
    " denominator_mean* grad_momentum_cosine* exp_avg_carryover signal_fraction rms_ratio*"
    " rms_ratio_max* amsgrad_gap",
    "underflow": "idle_fraction eps_dominated_fraction* eps_damping eps_energy_loss*"
    " exp_avg_sq_zero_fraction* exp_avg_sq_subnormal_fraction exp_avg_sq_stalled_fraction"
    " update_lost_fraction* nonfinite_count*",
    "update": "update_norm* normalized_update_rms* normalized_update_max"
    " normalized_update_large_fraction update_to_weight* update_to_weight_max",
    "weight_decay": "weight_norm* weight_rms decay_norm* decay_to_update* decay_alignment"
    " decay_to_grad decay_lost_fraction decay_timescale equilibrium_ratio",
    "schedule": "lr* beta1 beta2 eps weight_decay step skipped_steps",
}
"""The names by family; a star marks headline statistics."""

SELECTIONS = [
    (["grad_norm"], ["grad_norm"]),
    (["schedule/*e*"], ["beta1", "beta2", "eps", "weight_decay", "step", "skipped_steps"]),
    (
        ["adam_update/norm*"],
        ["normalized_update_rms", "normalized_update_max", "normalized_update_large_fraction"],
    ),
    (["lr", "grad_max"], ["grad_max", "lr"]),
    (["nothing"], []),
    (["all"], list(STATISTICS)),
]
"""Patterns and the names that they select."""


def test_keys_are_unchanged() -> None:
    names = [f"adam_{family}/{name}" for family, row in PROMISED.items() for name in row.split()]
    assert [each.key for each in STATISTICS.values()] == [name.rstrip("*") for name in names]
    headline = [name.rstrip("*") for name in names if name.endswith("*")]
    assert [each.key for each in select(["headline"])] == headline


def test_every_statistic_has_a_formula_a_meaning_and_known_accumulators() -> None:
    with each_row() as row:
        for name, statistic in STATISTICS.items():
            with row(name):
                assert statistic.formula
                assert statistic.meaning.endswith(".")
                assert re.fullmatch(r"adam_[a-z_]+/[a-z0-9_]+", statistic.key)
                assert set(statistic.accumulators) <= set(ACCUMULATORS)


def test_every_accumulator_and_column_is_used() -> None:
    needed = {name for each in STATISTICS.values() for name in each.accumulators}
    # The accumulator of a column may have its name.
    assert {name for name in set(ACCUMULATORS) - needed if name not in COLUMNS} == set()
    columns = {ACCUMULATORS[name].column for name in needed}
    assert set(DERIVED) <= columns
    assert sources_of(columns) == [*COLUMNS, *GIVEN]


def test_sums_come_before_maxima() -> None:
    are_maxima = [each.is_maximum for each in COLUMNS.values()]
    assert are_maxima == sorted(are_maxima)


def test_select_accepts_names_and_globs() -> None:
    with each_row() as row:
        for patterns, expected in SELECTIONS:
            with row(patterns):
                assert [each.name for each in select(patterns)] == expected
