"""Measurements of a saved optimizer → what is said of it, in 100 columns."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_adam.config.monitor import Scope
from lightning_adam.findings import RULES
from lightning_adam.findings.context import RunFacts
from lightning_adam.findings.describe import describe_finding
from lightning_adam.findings.engine import RuleEngine
from lightning_adam.findings.finding import Finding
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.reports.inspection.files import read
from lightning_adam.reports.inspection.numbers import (
    DTYPES,
    UNDERFLOWED,
    Change,
    Moments,
    in_dtype,
    measured,
    moments_of,
    with_eps,
)
from lightning_adam.reports.inspection.saved import Saved, optimizers_of
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.histograms import (
    EPS_SHOWN,
    HARMLESS,
    dominated_fractions,
    magnitude_above,
)
from lightning_adam.statistics.names import group_names

WIDTH = 100
NAME = 34
"""The longest name that a table shows whole."""
WORST = 3
BAR = 50
SHIFTS = (4, 2, 0, -2, -4)
"""The powers of ten by which other eps differ from the configured one."""
ALL = "all"
AS_IT_IS = " (as it is)"


class Shown(NamedTuple):
    """A column of a table."""

    head: str
    statistic: str
    is_share: bool = False


MOMENTS = (
    Shown("rms m", "exp_avg_rms"),
    Shown("mean v", "exp_avg_sq_mean"),
    Shown("mean √v̂", "denominator_mean"),
    Shown("rms u", "normalized_update_rms"),
    Shown("√v̂<eps", "eps_dominated_fraction", True),
    Shown("eps takes", "eps_energy_loss", True),
)
DIGITS = (
    Shown("v stalls", "exp_avg_sq_stalled_fraction", True),
    Shown("v subnormal", "exp_avg_sq_subnormal_fraction", True),
    Shown("v=0, m≠0", UNDERFLOWED.name, True),
    Shown("m=v=0", "idle_fraction", True),
    Shown("update lost", "update_lost_fraction", True),
    Shown("decay lost", "decay_lost_fraction", True),
)
WEIGHTS = (
    Shown("rms p", "weight_rms"),
    Shown("update/weight", "update_to_weight"),
    Shown("decay/update", "decay_to_update"),
    Shown("timescale", "decay_timescale"),
    Shown("equilibrium", "equilibrium_ratio"),
)
SECTIONS = (
    (
        "Moments",
        "m is Adam's mean of the gradients, v of their squares; it steps by lr·u, u = m̂/(√v̂+eps)."
        " Noise gives u an rms of √((1-β1)/(1+β1)), 0.23 at β1 = 0.9. eps should take nothing of"
        " it.",
        MOMENTS,
        "eps_energy_loss",
    ),
    (
        "What is rounded away",
        "v stalls where its dtype is too coarse for it to fall; an update or a decay is lost where"
        " it is too small to change its weight.",
        DIGITS,
        "update_lost_fraction",
    ),
    (
        "Weights and their decay",
        "The relative size of a step, decay beside it, the steps in which decay forgets a weight,"
        " and the weights' size beside that at which decay and noise balance.",
        WEIGHTS,
        "update_to_weight",
    ),
)
"""Title, what is to be known of it, columns, and the statistic that the worst layers are of."""
EPS_CHANGED = (
    Shown("√v̂<eps", "eps_dominated_fraction", True),
    Shown("eps takes", "eps_energy_loss", True),
    Shown("rms u", "normalized_update_rms"),
    Shown("update lost", "update_lost_fraction", True),
)
DTYPE_CHANGED = (
    Shown("v=0, m≠0", UNDERFLOWED.name, True),
    Shown("v stalls", "exp_avg_sq_stalled_fraction", True),
    Shown("eps takes", "eps_energy_loss", True),
    Shown("rms u", "normalized_update_rms"),
    Shown("update lost", "update_lost_fraction", True),
    Shown("decay lost", "decay_lost_fraction", True),
)


def inspect(path: Path, trust: bool = False) -> str:
    """What a checkpoint tells of its Adam.

    Args:
        path: A checkpoint of Lightning, or an optimizer's state_dict, alone or beside others.
        trust: Whether what is in the file may run (default: False).

    Raises:
        ConfigError: If it cannot be read, or has no optimizer of Adam's family.
    """
    content = read(path, trust)
    saved, others = optimizers_of(content)
    parts = [f"{path}: {content.title}"]
    parts += ["\n".join(_wrapped(f"Left out: {each}.")) for each in others]
    parts += ["\n\n".join(_told(each)) for each in saved]
    return "\n\n".join(parts)


def _told(saved: Saved) -> Iterator[str]:
    moments = moments_of(saved)
    yield _what_it_is(saved, moments)
    for title, meaning, columns, worst in SECTIONS:
        yield from _section(moments, title, meaning, columns, worst)
    if saved.is_adams:
        yield _eps_curve(moments)
        yield _other_eps(moments)
        yield _other_dtypes(moments)
        yield _findings(saved, moments)
    yield "\n".join(
        _wrapped(
            "More: lightning-adam explain eps_energy_loss, or the name of any other statistic. The"
            " gradient is in no checkpoint: what needs it, AdamMonitor measures in a training."
        )
    )


def _what_it_is(saved: Saved, moments: Moments) -> str:
    of = f"Optimizer {saved.name}: " if saved.name else ""
    parameters = sum(each.numel() for each in moments.states.parameter)
    tensors = "1 tensor" if len(moments.states) == 1 else f"{len(moments.states)} tensors"
    lines = [f"{of}{saved.kind}, {tensors} with {parameters:,} elements"]
    rows = [["group", "tensors", "elements", "lr", "peak", "betas", "eps", "decay", "step"]]
    for name, group in zip(group_names(saved.groups), saved.groups, strict=True):
        states = [state for state in moments.states if state.name.group == name]
        steps = sorted({float(state.step) for state in states})
        rows.append(
            [
                _short(name),
                str(len(group["params"])),
                f"{sum(state.parameter.numel() for state in states):,}",
                _number(float(group["lr"])),
                _number(float(peak_lr(group))),
                ", ".join(_number(float(each)) for each in group["betas"]),
                _number(float(group.get("eps", math.nan))),
                _number(float(group.get("weight_decay", math.nan))),
                "-".join(f"{each:.0f}" for each in steps[:1] + steps[1:][-1:]),
            ]
        )
    lines += _table(rows)
    own = _dtypes(each.dtype for each in moments.states.parameter)
    moment = _dtypes(each.dtype for each in moments.states.exp_avg)
    place = f"parameters {own} ({saved.weights})" if saved.weights else "parameters unknown"
    amsgrad = ", with amsgrad" if any(group.get("amsgrad") for group in saved.groups) else ""
    lines.append(f"  {place}, state {moment}{amsgrad}")
    lines += [line for note in saved.notes for line in _wrapped(note)]
    return "\n".join(lines)


def _section(
    moments: Moments, title: str, meaning: str, columns: Sequence[Shown], worst: str
) -> Iterator[str]:
    of = moments.measurement.of
    values = {ALL: of(Scope.model, moments.known).get("model", {})}
    shown = [column for column in columns if column.statistic in values[ALL]]
    if not shown:
        return
    groups = of(Scope.group, moments.known)
    if len(groups) > 1:
        values |= {f"group {name}": row for name, row in groups.items()}
    layers = of(Scope.layer, moments.known)
    ranked = sorted(layers, key=lambda name: -_rank(layers[name].get(worst)))[:WORST]
    if len(layers) > 1 and worst in values[ALL]:
        values |= {f"layer {name}": layers[name] for name in ranked}
    yield "\n".join([title, *_wrapped(meaning), *_values(shown, values)])


def _rank(value: float | None) -> float:
    """NaN is the worst there is."""
    if value is None:
        return -math.inf
    return math.inf if math.isnan(value) else value


def _eps_curve(moments: Moments) -> str:
    counts = moments.exponents.sum(0).tolist()
    configured = {state.settings.eps for state in moments.states}
    eps = sorted({*EPS_SHOWN, *(each for each in configured if each > 0)})
    shares = dominated_fractions(counts, eps)
    lines = ["What each eps would dominate: the share of the elements whose √v̂ is smaller"]
    for each, share in zip(eps, shares, strict=True):
        bar = "█" * round(share * BAR) if math.isfinite(share) else ""
        mark = "  < configured" if each in configured else ""
        lines.append(f"  {_number(each):>6} {_share(share):>6} {bar}{mark}".rstrip())
    return "\n".join(lines)


def _other_eps(moments: Moments) -> str:
    first, *others = sorted({state.settings.eps for state in moments.states})
    exponent = round(math.log10(first)) if first > 0 else -8
    chosen = {float(f"1e{exponent + shift}") for shift in SHIFTS} | ({first} - {0.0})
    rows = {}
    for eps in sorted(chosen, reverse=True):
        is_own = eps == first and not others
        name = _number(eps) + (AS_IT_IS if is_own else "")
        rows[name] = _changed(moments, EPS_CHANGED, None if is_own else with_eps(eps))
    lines = ["The last update, had eps been another", *_values(EPS_CHANGED, rows, "eps")]
    return "\n".join(lines)


def _other_dtypes(moments: Moments) -> str:
    own = {each.dtype for each in (*moments.states.parameter, *moments.states.exp_avg)}
    eps = [state.settings.eps for state in moments.states]
    rows, notes = {}, []
    for dtype in DTYPES:
        is_own = own == {dtype}
        name = dtype_name(dtype) + (AS_IT_IS if is_own else "")
        rows[name] = _changed(moments, DTYPE_CHANGED, None if is_own else in_dtype(dtype))
        if any(rounds_to_0(each, dtype) for each in eps):
            notes.append(f"eps is 0 in {dtype_name(dtype)}: where v is 0 too, the step is NaN.")
            for statistic in ("normalized_update_rms", "eps_energy_loss", "update_lost_fraction"):
                rows[name].pop(statistic, None)
    lines = ["The same step, were parameters and state of another dtype"]
    lines += _values(DTYPE_CHANGED, rows, "dtype")
    return "\n".join([*lines, *(line for note in notes for line in _wrapped(note))])


def _changed(moments: Moments, columns: Sequence[Shown], change: Change | None) -> dict[str, float]:
    names = {column.statistic for column in columns}
    known = [each for each in moments.known if each.name in names]
    measurement = moments.measurement
    if change is not None:
        measurement = measured(moments.states, known, change)
    return measurement.of(Scope.model, known).get("model", {})


def _findings(saved: Saved, moments: Moments) -> str:
    known = {each.name for each in moments.known}
    is_known = {code: {*rule.statistics} <= known for code, rule in RULES.items()}
    # A checkpoint is one measurement: it has no history.
    needs_history = {code for code, rule in RULES.items() if {"history", "spikes"} & {*rule.takes}}
    codes = [code for code in RULES if is_known[code] and code not in needs_history]
    engine = RuleEngine(
        {code: {"patience": 1} if code in codes else {"severity": "off"} for code in RULES},
        saved.name,
    )
    steps = [float(step) for step in moments.states.step]

    def low_denominator(scope: str) -> float | None:
        inside = moments.measurement.tensors_of(scope)
        chosen = [name.tensor in inside for name in moments.states.scopes.names]
        counts = moments.exponents[torch.tensor(chosen)].sum(0).tolist()
        return magnitude_above(counts, HARMLESS)

    facts = _run_facts(saved, moments)
    engine.judge(moments.measurement, int(max(steps)), facts, low_denominator=low_denominator)
    lines = ["Findings"]
    for finding in engine.open:
        lines += _described(finding)
    if not engine.open:
        lines.append("  None.")
    elif not saved.is_recorded and any(each.remedy for each in engine.open):
        lines += _wrapped(
            "optimizer.… is typed where lightning_adam's configs are used; elsewhere it is the"
            " argument of that name, in torch.optim.AdamW(…)."
        )
    lines += _wrapped(f"Judged: {', '.join(codes) or 'nothing'}.")
    for reason, chosen in _not_judged({*codes}, known).items():
        lines += _wrapped(f"Not judged, as {reason}: {', '.join(chosen)}.") if chosen else []
    return "\n".join(lines)


def _not_judged(judged: Set[str], known: Set[str]) -> dict[str, list[str]]:
    """The codes of the rules that are not judged, by the reason."""
    gradient, weights, history = (
        "the checkpoint has no gradient",
        "the weights or a part of the state are not known",
        "they need earlier measurements",
    )
    reasons: dict[str, list[str]] = {gradient: [], weights: [], history: []}
    for code, rule in RULES.items():
        unknown = {*rule.statistics} - known
        needs_gradient = any(Capabilities.GRADIENT in STATISTICS[name].needs for name in unknown)
        if code not in judged:
            reasons[gradient if needs_gradient else weights if unknown else history].append(code)
    return reasons


def _described(finding: Finding) -> list[str]:
    """A finding as lines."""
    title = f"  {finding.code} ({finding.severity}) in {finding.scope}"
    return [title, *(f"  {line}" for line in describe_finding(finding))]


def _run_facts(saved: Saved, moments: Moments) -> RunFacts:
    first = saved.groups[0]
    peaks = [float(peak_lr(group)) for group in saved.groups]
    own = moments.states.parameter if saved.weights else moments.states.exp_avg
    return RunFacts(
        defaults={**first, "lr": float(peak_lr(first))},
        dtypes=frozenset(dtype_name(each.dtype) for each in own),
        peak_lr=max(peaks),
    )


def _values(
    columns: Sequence[Shown], rows: Mapping[str, Mapping[str, float]], title: str = ""
) -> list[str]:
    """A table of the columns that any of the rows has; a point stands for what is undefined."""
    shown = [each for each in columns if any(each.statistic in row for row in rows.values())]
    table = [[title, *(column.head for column in shown)]]
    for name, row in rows.items():
        cells = [
            (_share if column.is_share else _number)(row[column.statistic])
            if column.statistic in row
            else "·"
            for column in shown
        ]
        table.append([_short(name), *cells])
    return _table(table)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _short(name: str) -> str:
    kind, _, rest = name.rpartition(" ")
    room = NAME - len(kind)
    return name if len(name) <= NAME else f"{kind} …{rest[1 - room :]}".strip()


def _number(value: float) -> str:
    """A number in three digits, and nothing more than it has.

    Example:
        >>> _number(1e-8), _number(0.00012345), _number(333333.3)
        ('1e-08', '0.000123', '3.33e+05')
    """
    return f"{value:.3g}"


def _share(value: float) -> str:
    """A share in per cent, in which what is not 0 or all does not look so.

    Example:
        >>> _share(0.0), _share(1e-6), _share(0.12345), _share(0.99999), _share(1.0)
        ('0%', '<0.1%', '12.3%', '>99.9%', '100%')
    """
    if value in (0, 1) or not math.isfinite(value):
        return f"{value:.0%}"
    if value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < value < 1 else f"{value:.1%}"


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(dtype_name, {*dtypes})))


def _wrapped(text: str, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(
        text, WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False
    )
