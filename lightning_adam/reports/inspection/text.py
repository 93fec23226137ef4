"""An inspection as text, in 100 columns."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_adam.config.monitor import Scope, Severity
from lightning_adam.findings.describe import describe_finding
from lightning_adam.optim.param_groups import peak_lr
from lightning_adam.reports.inspection.inspection import InspectedOptimizer, Inspection
from lightning_adam.reports.inspection.measurements import (
    DTYPES,
    UNDERFLOWED,
    Change,
    LastStep,
    in_dtype,
    measure,
    with_eps,
)
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.histograms import EPS_SHOWN, dominated_fractions
from lightning_adam.statistics.names import group_names

WIDTH = 100
MAX_NAME = 34
"""The longest name that a table shows whole."""
WORST = 3
BAR_WIDTH = 50
EPS_EXPONENTS = (4, 2, 0, -2, -4)
"""The powers of ten by which other values of eps differ from the configured one."""
CONFIGURED = " (configured)"


class Column(NamedTuple):
    """A column of a table."""

    title: str
    statistic: str
    is_fraction: bool = False


class Section(NamedTuple):
    """A table of the model, the groups and the worst layers."""

    title: str
    text: str
    columns: Sequence[Column]
    rank: str
    """The statistic by which layers are ranked."""


ROUNDING = (
    Column("v=0, m≠0", UNDERFLOWED.name, True),
    Column("v stalled", "exp_avg_sq_stalled_fraction", True),
)
EPS_LOSS = Column("lost to eps", "eps_energy_loss", True)
UPDATE = Column("rms u", "normalized_update_rms")
LOST = Column("update lost", "update_lost_fraction", True)
DECAY_LOST = Column("decay lost", "decay_lost_fraction", True)
BELOW_EPS = Column("√v̂<eps", "eps_dominated_fraction", True)
EPS_COLUMNS = (BELOW_EPS, EPS_LOSS, UPDATE, LOST)
DTYPE_COLUMNS = (*ROUNDING, EPS_LOSS, UPDATE, LOST, DECAY_LOST)
SECTIONS = (
    Section(
        "Moments",
        "m is the moving average of the gradient, v that of its square. The step is lr·u with"
        " u = m̂/(√v̂+eps). For noise, rms u is √((1-β1)/(1+β1)), or 0.23 at β1 = 0.9.",
        (
            Column("rms m", "exp_avg_rms"),
            Column("mean v", "exp_avg_sq_mean"),
            Column("mean √v̂", "denominator_mean"),
            UPDATE,
            BELOW_EPS,
            EPS_LOSS,
        ),
        "eps_energy_loss",
    ),
    Section(
        "Rounding",
        "v stalls where its dtype is too coarse for it to decay. An update or a decay is lost where"
        " it is too small to change its weight.",
        (
            *ROUNDING,
            Column("v subnormal", "exp_avg_sq_subnormal_fraction", True),
            Column("m=v=0", "idle_fraction", True),
            LOST,
            DECAY_LOST,
        ),
        "update_lost_fraction",
    ),
    Section(
        "Weights and weight decay",
        "The timescale is the number of steps in which decay shrinks a weight to 1/e. The"
        " equilibrium is the norm relative to that at which decay and updates balance.",
        (
            Column("rms p", "weight_rms"),
            Column("update/weight", "update_to_weight"),
            Column("decay/update", "decay_to_update"),
            Column("timescale", "decay_timescale"),
            Column("equilibrium", "equilibrium_ratio"),
        ),
        "update_to_weight",
    ),
)


def describe_inspection(inspection: Inspection) -> str:
    """Returns an inspection as text: summary and findings of each optimizer, then the details."""
    checkpoint = inspection.checkpoint
    blocks = [f"{checkpoint.path}: {checkpoint.title}"]
    blocks += [_lines(f"Left out: {each}.", 0) for each in inspection.left_out]
    for optimizer in inspection.optimizers:
        blocks += [_summary(optimizer), *_findings(optimizer)]
    for optimizer in inspection.optimizers:
        name = optimizer.saved.name
        blocks += [f"Optimizer {name}"] if name else []
        blocks += _details(optimizer)
    blocks.append(
        "lightning-adam explain NAME explains a statistic or a finding. Only AdamMonitor sees"
        " gradients."
    )
    return "\n\n".join(blocks)


def verdict(optimizer: InspectedOptimizer) -> str:
    """Returns the number of errors and warnings of an optimizer."""
    severities = [finding.severity for finding in optimizer.findings]
    counts = {each.value: severities.count(each) for each in (Severity.error, Severity.warning)}
    found = ", ".join(
        f"{count} {name}{'s'[: count > 1]}" for name, count in counts.items() if count
    )
    return found or "No issues found"


def _summary(optimizer: InspectedOptimizer) -> str:
    saved, states = optimizer.saved, optimizer.last_step.states
    number = sum(each.numel() for each in states.parameter)
    tensors = f"{len(states)} tensor{'' if len(states) == 1 else 's'}"
    own = f"{_dtypes(states.parameter)} ({saved.weights})" if saved.weights else "weights unknown"
    rows = {
        "class": saved.class_name,
        "parameters": f"{number:,} in {tensors}, {own}",
        "moments": _dtypes(states.exp_avg),
        "step": " to ".join(map(str, dict.fromkeys([*optimizer.steps[:1], *optimizer.steps[-1:]]))),
        **{name: _setting(saved.groups, name) for name in ("lr", "betas", "eps", "weight_decay")},
        "amsgrad": _setting(saved.groups, "amsgrad").replace("False", ""),
        "rules": f"{', '.join(optimizer.judged)}",
    }
    title = f"Optimizer {saved.name}: " * bool(saved.name) + verdict(optimizer)
    width = max(map(len, rows))
    lines = [title]
    for name, value in rows.items():
        lines += _wrapped(f"{name:<{width}}  {value}", 2, width + 4) if value else []
    return "\n".join([*lines, *(line for note in saved.notes for line in _wrapped(note))])


def _setting(groups: Sequence[Mapping[str, Any]], name: str) -> str:
    """A setting of the groups; of different values, each with its groups, or their range."""
    shown: dict[str, list[str]] = {}
    for group_name, group in zip(group_names(groups), groups, strict=True):
        value = group.get(name, math.nan)
        text = str(value) if isinstance(value, bool) else ", ".join(map(_number, _floats(value)))
        if name == "lr" and float(value) != float(peak_lr(group)):
            text += f" (peak {_number(float(peak_lr(group)))})"
        shown.setdefault(text, []).append(group_name)
    if len(shown) == 1:
        return next(iter(shown))
    if len(shown) > WORST:
        return f"{len(shown)} values in {len(groups)} groups"
    return "; ".join(f"{text} in {', '.join(names)}" for text, names in shown.items())


def _floats(value: Any) -> list[float]:
    return [*map(float, value)] if isinstance(value, list | tuple) else [float(value)]


def _findings(optimizer: InspectedOptimizer) -> Iterator[str]:
    for finding in optimizer.findings:
        title = f"{finding.code} ({finding.severity}) in {finding.scope}"
        yield "\n".join([title, *describe_finding(finding)])
    has_override = any(finding.remedy for finding in optimizer.findings)
    if has_override and not optimizer.saved.is_recorded:
        yield _lines(
            "optimizer.NAME=VALUE is an override of lightning_adam's configs. Elsewhere, pass"
            " NAME=VALUE to torch.optim.AdamW.",
            0,
        )


def _details(optimizer: InspectedOptimizer) -> Iterator[str]:
    last_step = optimizer.last_step
    if len(optimizer.saved.groups) > 1:
        yield _groups(optimizer)
    for section in SECTIONS:
        yield from _section(last_step, section)
    if optimizer.saved.is_adam:
        yield _eps_curve(last_step)
        yield _other_eps(last_step)
        yield _other_dtypes(last_step)
    reasons = optimizer.not_judged().items()
    lines = [f"Because {reason}: {', '.join(codes)}." for reason, codes in reasons]
    yield "\n".join(["Rules that were not judged", *map(_lines, lines)])


def _groups(optimizer: InspectedOptimizer) -> str:
    rows = [["", "tensors", "elements", "lr", "peak", "betas", "eps", "weight_decay"]]
    groups = optimizer.saved.groups
    for name, group in zip(group_names(groups), groups, strict=True):
        states = [state for state in optimizer.last_step.states if state.name.group == name]
        values = (
            group["lr"],
            peak_lr(group),
            group["betas"],
            group.get("eps"),
            group.get("weight_decay"),
        )
        rows.append(
            [
                _short(name),
                str(len(group["params"])),
                f"{sum(state.parameter.numel() for state in states):,}",
                *(", ".join(map(_number, _floats(math.nan if v is None else v))) for v in values),
            ]
        )
    return "\n".join(["Parameter groups", *_table(rows)])


def _section(last_step: LastStep, section: Section) -> Iterator[str]:
    of = last_step.measurement.of
    rows = {"model": last_step.model()}
    columns = [each for each in section.columns if each.statistic in rows["model"]]
    if not columns:
        return
    groups = of(Scope.group, last_step.statistics)
    if len(groups) > 1:
        rows |= {f"group {name}": row for name, row in groups.items()}
    layers = of(Scope.layer, last_step.statistics)
    worst = sorted(layers, key=lambda name: -_rank(layers[name].get(section.rank)))[:WORST]
    if len(layers) > 1 and section.rank in rows["model"]:
        rows |= {f"layer {name}": layers[name] for name in worst}
    yield "\n".join([section.title, *_wrapped(section.text), *_values(columns, rows)])


def _rank(value: float | None) -> float:
    """Ranks NaN first and a missing value last."""
    if value is None:
        return -math.inf
    return math.inf if math.isnan(value) else value


def _eps_curve(last_step: LastStep) -> str:
    configured = {state.settings.eps for state in last_step.states}
    eps = sorted({*EPS_SHOWN, *(each for each in configured if each > 0)})
    rows, folded = [], {0.0: 0, 1.0: 0}
    for each, share in zip(eps, dominated_fractions(last_step.denominators(), eps), strict=True):
        if share in folded and each not in configured:
            folded[share] += 1
            continue
        bar = "█" * round(share * BAR_WIDTH) if math.isfinite(share) else ""
        mark = "  < configured" if each in configured else ""
        rows.append(f"  {_number(each):>6} {_fraction(share):>6} {bar}{mark}".rstrip())
    rows += [f"  {n} other values of eps: {share:.0%}" for share, n in folded.items() if n]
    return "\n".join(["Elements whose √v̂ is below eps, for different values of eps", *rows])


def _other_eps(last_step: LastStep) -> str:
    first, *others = sorted({state.settings.eps for state in last_step.states})
    exponent = round(math.log10(first)) if first > 0 else -8
    values = {float(f"1e{exponent + each}") for each in EPS_EXPONENTS} | ({first} - {0.0})
    rows = {}
    for eps in sorted(values, reverse=True):
        is_own = eps == first and not others
        name = _number(eps) + CONFIGURED * is_own
        rows[name] = _changed(last_step, EPS_COLUMNS, None if is_own else with_eps(eps))
    title = "The last update under other values of eps"
    return "\n".join([title, *_values(EPS_COLUMNS, rows, "eps")])


def _other_dtypes(last_step: LastStep) -> str:
    states = last_step.states
    own = {each.dtype for each in (*states.parameter, *states.exp_avg)}
    rows, notes = {}, []
    for dtype in DTYPES:
        is_own = own == {dtype}
        name = dtype_name(dtype) + CONFIGURED * is_own
        rows[name] = _changed(last_step, DTYPE_COLUMNS, None if is_own else in_dtype(dtype))
        if any(rounds_to_0(each.settings.eps, dtype) for each in states):
            notes.append(f"eps is 0 in {dtype_name(dtype)}: where v is 0 too, the step is NaN.")
            for column in (UPDATE, EPS_LOSS, LOST):
                rows[name].pop(column.statistic, None)
    title = "The last step with parameters and moments in other dtypes"
    return "\n".join([title, *_values(DTYPE_COLUMNS, rows, "dtype"), *map(_lines, notes)])


def _changed(
    last_step: LastStep, columns: Sequence[Column], change: Change | None
) -> dict[str, float]:
    names = {column.statistic for column in columns}
    statistics = [each for each in last_step.statistics if each.name in names]
    measurement = last_step.measurement
    if change is not None:
        measurement = measure(last_step.states, statistics, change)
    return measurement.of(Scope.model, statistics).get("model", {})


def _values(
    columns: Sequence[Column], rows: Mapping[str, Mapping[str, float]], title: str = ""
) -> list[str]:
    """A table of statistics, `·` where one is undefined; several rows of 0% become one line."""
    shown = [each for each in columns if any(each.statistic in row for row in rows.values())]
    cells = {
        name: [
            (_fraction if column.is_fraction else _number)(row[column.statistic])
            if column.statistic in row
            else "·"
            for column in shown
        ]
        for name, row in rows.items()
    }
    zeros = [name for name, row in cells.items() if {*row} == {"0%"}]
    titles = [column.title for column in shown]
    if len(zeros) == len(rows):
        return _wrapped(f"{'; '.join(titles)}: 0%")
    folded = zeros if len(zeros) > 1 else []
    table = [[_short(name), *row] for name, row in cells.items() if name not in folded]
    return _table([[title, *titles], *table]) + [f"  {len(folded)} other rows: 0%"] * bool(folded)


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
    scope, _, rest = name.rpartition(" ")
    room = MAX_NAME - len(scope)
    return name if len(name) <= MAX_NAME else f"{scope} …{rest[1 - room :]}".strip()


def _number(value: float) -> str:
    """A number in at most three digits.

    Example:
        >>> _number(1e-8), _number(0.00012345), _number(333333.3)
        ('1e-08', '0.000123', '3.33e+05')
    """
    return f"{value:.3g}"


def _fraction(value: float) -> str:
    """A fraction in per cent; only 0 and 1 are shown as 0% and 100%.

    Example:
        >>> _fraction(0.0), _fraction(1e-6), _fraction(0.12345), _fraction(0.99999), _fraction(1.0)
        ('0%', '<0.1%', '12.3%', '>99.9%', '100%')
    """
    if value in (0, 1) or not math.isfinite(value):
        return f"{value:.0%}"
    if value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < value < 1 else f"{value:.1%}"


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return ", ".join(sorted({dtype_name(each.dtype) for each in tensors}))


def _wrapped(text: str, indent: int = 2, hanging: int | None = None) -> list[str]:
    following = " " * (indent if hanging is None else hanging)
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=following,
        break_on_hyphens=False,
    )


def _lines(text: str, indent: int = 2) -> str:
    return "\n".join(_wrapped(text, indent))
