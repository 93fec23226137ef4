"""The overrides that are suggested, and where none are."""

import math
from typing import Any

import pytest

from lightning_adam.config.errors import ConfigPath, Source
from lightning_adam.findings import RULES, Suggestion, suggestions
from lightning_adam.findings.context import GroupFacts, History, RuleContext, RunFacts
from lightning_adam.findings.context import RunningSummary as Summary
from lightning_adam.findings.preflight import NOTICES
from tests.support.tables import each_row

DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NORM = History({"grad_norm": Summary.of(0.7)})


def context(low_denominator: float | None = None, **facts: Any) -> RuleContext:
    """Returns the context of a run; `facts` may include settings of the optimizer."""
    settings = {name: facts.pop(name) for name in [*facts] if name in DEFAULTS}
    run = RunFacts(defaults={**DEFAULTS, **settings}, **facts)
    return RuleContext({}, run, NORM, low_denominator=lambda: low_denominator)


def overrides(found: list[Suggestion]) -> list[str]:
    return [override for each in found for override in each.overrides]


def of_rules(**facts: Any) -> dict[str, list[Suggestion]]:
    """Returns all suggestions by code, in a run in which every statistic is 0.5."""
    run = RunFacts(**{"defaults": DEFAULTS, "samples_per_step": 1024.0, **facts})
    given = {
        code: dict.fromkeys((*each.statistics, *each.evidence), 0.5) for code, each in RULES.items()
    }
    suggest = {code: each.suggest for code, each in RULES.items()}
    suggest |= {code: each.suggest for code, each in NOTICES.items()}
    return {
        code: function(RuleContext(given.get(code, {}), run, NORM, low_denominator=lambda: 1e-9))
        for code, function in suggest.items()
    }


def test_suggestions_are_finite_where_statistics_are_unknown_and_the_run_has_no_end() -> None:
    with each_row() as row:
        for dtype in ("float32", "bfloat16", "float16"):
            found = of_rules(dtypes=frozenset({dtype}), samples_per_step=math.nan)
            for code in RULES:
                with row((code, dtype)):
                    for each in found[code]:
                        assert each.overrides or each.hint
                        assert all(override.partition("=")[2] for override in each.overrides)
                    assert not [each for each in overrides(found[code]) if "nan" in each]
                    assert not [each for each in overrides(found[code]) if "inf" in each]


def test_every_learning_rate_is_a_sweep_to_compare() -> None:
    found = of_rules()
    with_lr = [code for code, each in found.items() if any("lr=" in one for one in overrides(each))]
    assert {"learning_rate_too_small", "learning_rate_too_large"} <= {*with_lr}
    with each_row() as row:
        for code in with_lr:
            with row(code):
                (sweep,) = [each for each in found[code] if "lr=" in str(each.overrides)]
                assert sweep.is_sweep
                assert sweep.is_lead
                assert str(sweep).startswith("--multirun optimizer.lr=")
                assert "," in str(sweep)


def test_sweep_is_over_multiples_of_the_optimizers_learning_rate() -> None:
    # The scale of a group changes the peak of the run, but not the setting.
    found = suggestions.try_larger_lr(context(lr=1e-3, peak_lr=0.02))
    assert overrides(found) == ["optimizer.lr=0.001,0.003,0.01,0.03"]


def test_clipping_is_suggested_at_twice_the_usual_norm() -> None:
    assert overrides(suggestions.clip_gradients(context())) == ["trainer.gradient_clip_val=1.0"]


def test_clipping_is_not_suggested_if_the_trainer_clips_or_cannot_clip() -> None:
    rows: list[dict[str, Any]] = [{"is_clipped": True}, {"is_manual_optimization": True}]
    with each_row() as row:
        assert "gradient_clip_val" in str(of_rules())
        for facts in rows:
            with row(facts):
                assert "gradient_clip_val" not in str(of_rules(**facts))


def test_settings_of_a_schedule_are_suggested_only_if_it_has_them() -> None:
    own = {"name": "cosine", "warmup_steps": 0, "total_steps": 10}
    rows = [(None, set()), (own, {"warmup_steps", "total_steps"})]
    with each_row() as row:
        for schedule, expected in rows:
            with row(schedule):
                found = of_rules(schedule=schedule, total_steps=1000)
                names = [each for code in found for each in overrides(found[code])]
                settings = {each.partition("=")[0] for each in names if "scheduler" in each}
                assert settings == {f"scheduler.{each}" for each in expected}


def test_decay_timescale_suggests_no_weight_decay() -> None:
    assert of_rules()["decay_timescale"] == []


def test_nonfinite_value_suggests_neither_a_learning_rate_nor_clipping() -> None:
    for dtype in ("float32", "float16"):
        names = {
            each.partition("=")[0]
            for each in overrides(of_rules(dtypes=frozenset({dtype}))["not_finite"])
        }
        precise = {"trainer.precision"} if dtype == "float16" else set()
        assert names == {"trainer.detect_anomaly", *precise}


def test_suggested_eps_is_the_largest_power_of_ten_below_a_twentieth_of_the_denominators() -> None:
    rows = [(1e-8, 5e-9, 1e-10), (1e-8, 3e-12, 1e-13), (1e-3, 1e-6, 1e-8), (1e-8, 1e-6, None)]
    with each_row() as row:
        for eps, low_denominator, suggested in rows:
            with row((eps, low_denominator)):
                found = overrides(suggestions.reduce_eps(context(low_denominator, eps=eps)))
                assert found == ([] if suggested is None else [f"optimizer.eps={suggested}"])


def test_suggested_beta2_averages_a_tenth_of_the_steps_and_is_at_least_0_95() -> None:
    rows = [(0.9999, [0.999]), (0.999, [0.99]), (0.99, [0.95]), (0.96, [0.95]), (0.95, [])]
    with each_row() as row:
        for beta2, suggested in rows:
            with row(beta2):
                given = context(betas=(0.9, beta2), samples_per_step=1024.0)
                expected = [f"optimizer.betas=[0.9,{each}]" for each in suggested]
                assert overrides(suggestions.lower_beta2(given)) == expected


def test_lower_beta2_is_not_suggested_at_small_batches() -> None:
    for samples, is_suggested in [(math.nan, False), (32.0, False), (256.0, True)]:
        found = suggestions.lower_beta2(context(samples_per_step=samples))
        assert bool(found) == is_suggested, samples


@pytest.mark.parametrize("beta1", [0.9, 0.95, 0.98, 0.995, 0.999])
def test_no_suggestion_sets_beta1_above_the_root_of_beta2(beta1: float) -> None:
    with each_row() as row:
        for beta2 in (0.9, 0.99, 0.999, 0.9999):
            for samples in (1.0, 16.0, 1024.0):
                with row((beta2, samples)):
                    found = of_rules(
                        defaults={**DEFAULTS, "betas": (beta1, beta2)}, samples_per_step=samples
                    )
                    names = [each for code in found for each in overrides(found[code])]
                    for each in names:
                        name, _, value = each.partition("=")
                        if name == "optimizer.betas":
                            first, second = map(float, value.strip("[]").split(","))
                            assert first == beta1
                            assert first < math.sqrt(second)


def test_full_precision_is_suggested_with_an_eps_for_float32() -> None:
    precise = "trainer.precision=16-mixed"
    rows = [(1e-4, [precise, "optimizer.eps=1e-08"]), (1e-8, [precise]), (1e-10, [precise])]
    with each_row() as row:
        for eps, expected in rows:
            with row(eps):
                given = context(dtypes=frozenset({"float16"}), eps=eps)
                (suggestion,) = suggestions.prevent_underflow(given)
                assert [*suggestion.overrides] == expected


def test_weaker_decay_is_suggested_only_where_it_is_weaker() -> None:
    def found(decay_to_update: float) -> list[str]:
        run = RunFacts(defaults=DEFAULTS)
        given = RuleContext({"decay_to_update": decay_to_update}, run)
        return overrides(suggestions.weaken_decay(given))

    assert found(0.5) == ["optimizer.weight_decay=0.02"]
    assert found(0.05) == []


def test_suggestion_names_each_group_that_has_the_setting_itself() -> None:
    eps = ConfigPath("optimizer", "groups.0.eps")
    groups = [
        GroupFacts("head", {**DEFAULTS, "eps": 1e-6}, {"eps": eps}),
        GroupFacts("decay", DEFAULTS),
        GroupFacts("no_decay", DEFAULTS),
    ]
    run = RunFacts(defaults=DEFAULTS, groups=groups)
    rows = [
        ((), ["optimizer.groups.0.eps=1e-10", "optimizer.eps=1e-10"]),
        (["head"], ["optimizer.groups.0.eps=1e-10"]),
        (["decay", "no_decay"], ["optimizer.eps=1e-10"]),
    ]
    with each_row() as row:
        for names, expected in rows:
            with row(names):
                given = RuleContext({}, run, groups=names, low_denominator=lambda: 5e-9)
                assert overrides(suggestions.reduce_eps(given)) == expected


def test_trainer_setting_is_written_as_an_option_of_lightning_cli() -> None:
    path = ConfigPath("model.optimizer", source=Source.LIGHTNING_CLI)
    found = overrides(suggestions.clip_gradients(context(optimizer_path=path)))
    assert found == ["--trainer.gradient_clip_val=1.0"]
