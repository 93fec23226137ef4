"""What to type against a pathology, computed from the numbers that prove it."""

import math

from lightning_adam.findings.rule import Case, Cure

LOWEST_EPS = 1e-20
"""Below it, float32 cannot hold the v of a gradient that eps would not dominate."""
HALF = {"float16": "16-mixed", "bfloat16": "bf16-mixed"}
"""What Lightning calls half precision with parameters in float32."""


def rounded(number: float) -> float:
    """A number to one digit, as settings are chosen.

    Example:
        >>> rounded(0.000333)
        0.0003
    """
    return float(f"{number:.0e}")


def optimizer_cure(case: Case, hint: str = "", **settings: object) -> Cure:
    """Other settings of the optimizer.

    Example:
        >>> from lightning_adam.findings.rule import Training
        >>> optimizer_cure(Case({}, Training()), betas=[0.9, 0.95]).overrides
        ('optimizer.betas=[0.9,0.95]',)
    """
    path = case.training.optimizer_path
    overrides = ((path / name).unquoted_override(value) for name, value in settings.items())
    return Cure(tuple(overrides), hint)


def scaled_lr(case: Case, factor: float) -> Cure:
    """Another learning rate, everywhere."""
    return optimizer_cure(case, lr=rounded(case.setting("lr") * factor))


def larger_lr(case: Case) -> list[Cure]:
    """A learning rate ten times as large."""
    return [scaled_lr(case, 10)]


def smaller_lr(case: Case) -> list[Cure]:
    """A learning rate a third as large."""
    return [scaled_lr(case, 1 / 3)]


def other_beta2(case: Case, beta2: float) -> Cure:
    """Another memory of the second moment."""
    return optimizer_cure(case, betas=[case.betas[0], beta2])


def lower_beta2(case: Case) -> list[Cure]:
    """A second moment that remembers a tenth as long, if it is not short already."""
    beta2 = case.betas[1]
    if beta2 <= 0.9:
        return []
    return [other_beta2(case, round(1 - min(10 * (1 - beta2), 0.1), 6))]


def clip(case: Case) -> Cure:
    """Gradients clipped at what is usual."""
    return Cure(("trainer.gradient_clip_val=1.0",))


def full_precision(case: Case) -> list[Cure]:
    """Parameters and state in float32, which mixed precision keeps."""
    precisions = [HALF[each] for each in sorted(case.training.dtypes & HALF.keys())]
    hint = "parameters and Adam's state in float32"
    return [Cure((f"trainer.precision={each}",), hint) for each in precisions[:1]]


def smaller_eps(case: Case) -> list[Cure]:
    """The largest power of ten whose twentyfold less than 1 % of the denominators are below.

    An eps that is a tenth of a denominator still takes a sixth of the energy of its update.
    """
    if "float16" in case.training.dtypes:
        return full_precision(case)
    low = case.low_denominator()
    if low is not None and low > LOWEST_EPS:
        eps = float(f"1e{math.floor(math.log10(low / 20))}")
        if eps < case.values.get("eps", math.inf):
            return [optimizer_cure(case, eps=eps)]
    return [
        Cure((), "multiply the loss by a constant, 1e6 say: but for eps Adam does not feel it"),
        Cure((), "Adam-atan2, which has no eps (Everett et al. 2024, arXiv 2407.05872)"),
    ]


def representable_eps(case: Case) -> list[Cure]:
    """An eps that the parameters' dtype can hold, or parameters that can hold it."""
    return [*full_precision(case), optimizer_cure(case, eps=1e-4)]


def state_that_holds_gradients(case: Case) -> list[Cure]:
    """A second moment that the squares of the gradients do not underflow in."""
    scale = Cure((), "multiply the loss by a constant, 1e6 say: but for eps Adam does not feel it")
    # An eps that was chosen for half precision is too large beside float32.
    is_large = case.setting("eps") > 1e-8
    eps = optimizer_cure(case, eps=1e-8).overrides if is_large else ()
    precise = full_precision(case)
    return [each._replace(overrides=(*each.overrides, *eps)) for each in precise] or [scale]


def state_that_decays(case: Case) -> list[Cure]:
    """A second moment that can forget in its dtype."""
    return [*full_precision(case), other_beta2(case, min(case.betas[1], 0.99))]


def kept_updates(case: Case) -> list[Cure]:
    """Parameters in float32, or what makes up for the digits that they lack."""
    kahan = "Kahan summation (torch-optimi) or stochastic rounding (torchao), if memory is short"
    larger = [] if case.training.dtypes & HALF.keys() else [scaled_lr(case, 10)]
    return [*full_precision(case), *larger, Cure((), kahan)]


def faster_second_moment(case: Case) -> list[Cure]:
    """What keeps a jump of the gradient from becoming one of the weights."""
    lag = max(case.values["rms_ratio"], 1.0)
    return [clip(case), *lower_beta2(case), scaled_lr(case, 1 / lag)]


def calmer_steps(case: Case) -> list[Cure]:
    """Smaller steps, or a second moment that follows the gradient."""
    shuffled = Cure((), "more randomness in the order of the data")
    smaller = [scaled_lr(case, 1 / 3)] if case.values["update_to_weight"] > 1e-3 else []
    return [*smaller, *lower_beta2(case), shuffled]


def no_amsgrad(case: Case) -> list[Cure]:
    """A second moment that may fall again."""
    return [optimizer_cure(case, amsgrad=False), clip(case)]


def weaker_decay(case: Case) -> list[Cure]:
    """A decay that is a tenth of the step."""
    factor = 0.1 / case.values["decay_to_update"]
    weight_decay = rounded(case.setting("weight_decay") * factor)
    return [optimizer_cure(case, weight_decay=weight_decay)]


def decoupled_decay(case: Case) -> list[Cure]:
    """AdamW, at the strength that is usual there."""
    return [optimizer_cure(case, "AdamW", decoupled_weight_decay=True, weight_decay=0.01)]


def decay_within_the_run(case: Case) -> list[Cure]:
    """The decay that forgets a weight in three epochs, or in a third of a shorter run."""
    training = case.training
    steps = training.total_steps / 3
    if math.isfinite(training.steps_per_epoch):
        steps = min(steps, 3 * training.steps_per_epoch)
    if not math.isfinite(steps) or steps <= 0:
        return []
    weight_decay = rounded(1 / (training.peak_lr * steps))
    return [optimizer_cure(case, weight_decay=weight_decay)]


def restored_state(case: Case) -> list[Cure]:
    """The optimizer's state as it was."""
    return [
        Cure((), "resume with ckpt_path, which restores the optimizer's state with its step"),
    ]


def first_nonfinite(case: Case) -> list[Cure]:
    """A smaller step, and where to look."""
    return [
        scaled_lr(case, 0.1),
        clip(case),
        Cure(("trainer.detect_anomaly=true",), "says which operation it comes from"),
    ]


def whole_schedule(case: Case) -> list[Cure]:
    """A schedule that is as long as the training."""
    steps = case.training.total_steps
    total = int(steps) if math.isfinite(steps) else None
    return [Cure(((case.training.scheduler_path / "total_steps").unquoted_override(total),))]


def longer_warmup(case: Case) -> list[Cure]:
    """A warm-up as long as the second moment's memory twice over, or a tenth of a short run."""
    steps = min(2 / (1 - case.betas[1]), case.training.total_steps / 10)
    path = case.training.scheduler_path / "warmup_steps"
    return [Cure((path.unquoted_override(math.ceil(steps)),))]


def trained_or_frozen(case: Case) -> list[Cure]:
    """All parameters in a group, or without a gradient."""
    return [Cure((), "give them to the optimizer, or say parameter.requires_grad_(False)")]
