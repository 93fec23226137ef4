"""Formats an inspection as text with 100 columns."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

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
from lightning_adam.statistics.catalogue import STATISTICS
from lightning_adam.statistics.dtypes import dtype_name, rounds_to_0
from lightning_adam.statistics.histograms import EPS_SHOWN, dominated_fractions
from lightning_adam.statistics.names import group_names

WIDTH = 100
MAX_NAME = 34
"""Longest name in a table without truncation."""
MOST = 3
"""Largest number of layers or values to list."""
BAR_WIDTH = 50
EPS_EXPONENTS = (4, 2, 0, -2, -4)
"""Exponents of the factors between the configured eps and other values."""
TITLES = {
    "exp_avg_rms": "rms m",
    "exp_avg_sq_mean": "mean v",
    "denominator_mean": "mean √v̂",
    "normalized_update_rms": "rms u",
    "eps_dominated_fraction": "√v̂<eps",
    "eps_energy_loss": "lost to eps",
    UNDERFLOWED.name: "v=0, m≠0",
    "exp_avg_sq_stalled_fraction": "v stalled",
    "exp_avg_sq_subnormal_fraction": "v subnormal",
    "idle_fraction": "m=v=0",
    "update_lost_fraction": "update lost",
    "decay_lost_fraction": "decay lost",
    "weight_rms": "rms p",
    "update_to_weight": "update/weight",
    "decay_to_update": "decay/update",
    "decay_timescale": "timescale",
    "equilibrium_ratio": "equilibrium",
}
"""The statistics to show, and the titles of their columns."""
NAMES = [*TITLES]
SECTIONS = (
    (
        "Moments",
        "m is the moving average of the gradient, and v that of its square. The step is lr·u with"
        " u = m̂/(√v̂+eps). For noise, rms u is √((1-β1)/(1+β1)), or 0.23 at β1 = 0.9.",
        NAMES[:6],
        "eps_energy_loss",
    ),
    (
        "Rounding",
        "v is stalled if its dtype is too coarse for it to decay. An update or weight decay is lost"
        " if it is too small to change the weight.",
        NAMES[6:12],
        "update_lost_fraction",
    ),
    (
        "Weights and weight decay",
        "The timescale is the number of steps in which decay shrinks a weight to 1/e. The"
        " equilibrium is the norm relative to the one at which decay and updates balance.",
        NAMES[12:],
        "update_to_weight",
    ),
)
"""Title, explanation and statistics of each table, and the statistic that ranks layers."""
UPDATE = ("eps_energy_loss", "normalized_update_rms", "update_lost_fraction")
"""The statistics that depend on eps."""
EPS_TABLE = ("eps_dominated_fraction", *UPDATE)
DTYPE_TABLE = (UNDERFLOWED.name, "exp_avg_sq_stalled_fraction", *UPDATE, "decay_lost_fraction")


def describe_inspection(inspection: Inspection) -> str:
    """Returns an inspection as text: summary and findings of each optimizer, then details."""
    checkpoint = inspection.checkpoint
    blocks = [f"{checkpoint.path}: {checkpoint.title}"]
    blocks += ["\n".join(_wrap(f"Not inspected: {each}.", 0)) for each in inspection.not_inspected]
    for optimizer in inspection.optimizers:
        blocks += [_summary(optimizer), *_findings(optimizer)]
    for optimizer in inspection.optimizers:
        blocks += [f"Optimizer {optimizer.saved.name}"] * bool(optimizer.saved.name)
        blocks += _details(optimizer)
    blocks.append("Run lightning-adam explain NAME for a statistic or a finding.")
    return "\n\n".join(blocks)


def _summary(optimizer: InspectedOptimizer) -> str:
    saved, states = optimizer.saved, optimizer.last_step.states
    number = sum(each.numel() for each in states.parameter)
    tensors = f"{len(states)} tensor{'s'[: len(states) != 1]}"
    own = f"{_dtypes(states.parameter)} ({saved.weights})" if saved.weights else "weights unknown"
    amsgrad = " with amsgrad" if any(group.get("amsgrad") for group in saved.groups) else ""
    rows = {
        "class": saved.class_name + amsgrad,
        "parameters": f"{number:,} in {tensors}, {own}",
        "moments": _dtypes(states.exp_avg),
        "step": _range(optimizer.steps),
        **{name: _setting(saved.groups, name) for name in ("lr", "betas", "eps", "weight_decay")},
        "rules": ", ".join(optimizer.judged),
    }
    severities = [finding.severity for finding in optimizer.findings]
    counts = [(severities.count(each), each) for each in (Severity.error, Severity.warning)]
    verdict = ", ".join(f"{count} {name}{'s'[: count > 1]}" for count, name in counts if count)
    name = f"Optimizer {saved.name}: " if saved.name else ""
    lines = [name + (verdict or "No issues found")]
    for name, value in rows.items():
        lines += _wrap(f"{name:<12}  {value}", hanging=16) if value else []
    return "\n".join([*lines, *(line for note in saved.notes for line in _wrap(note))])


def _setting(groups: Sequence[Mapping[str, Any]], name: str) -> str:
    """Returns a setting, with the groups of each value if they differ, or the range of many."""
    found: dict[str, list[str]] = {}
    if not all(name in group for group in groups):
        return ""
    for group_name, group in zip(group_names(groups), groups, strict=True):
        value = group[name]
        text = ", ".join(_number(float(each)) for each in (value if name == "betas" else [value]))
        if name == "lr" and float(value) != float(peak_lr(group)):
            text += f" (peak {_number(float(peak_lr(group)))})"
        found.setdefault(text, []).append(group_name)
    if len(found) > MOST and name != "betas":
        values = sorted(float(group[name]) for group in groups)
        return f"{_range(map(_number, values))} in {len(groups)} groups"
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} in {', '.join(names)}" for text, names in found.items())


def _range(values: Iterable[object]) -> str:
    texts = [*dict.fromkeys(map(str, values))]
    return " to ".join(texts[:1] + texts[1:][-1:])


def _findings(optimizer: InspectedOptimizer) -> Iterator[str]:
    for finding in optimizer.findings:
        title = f"{finding.code} ({finding.severity}) in {finding.scope}"
        yield "\n".join([title, *describe_finding(finding)])
    if not optimizer.saved.is_recorded and any(each.remedy for each in optimizer.findings):
        text = (
            "optimizer.NAME=VALUE is an override of the lightning_adam configs. Without them, pass"
            " NAME=VALUE to torch.optim.AdamW."
        )
        yield "\n".join(_wrap(text, 0))


def _details(optimizer: InspectedOptimizer) -> Iterator[str]:
    last_step = optimizer.last_step
    for section in SECTIONS:
        yield from _section(last_step, *section)
    if optimizer.saved.is_adam:
        yield _eps_curve(last_step)
        yield _other_eps(last_step)
        yield _other_dtypes(last_step)
    reasons = optimizer.not_judged().items()
    lines = [line for why, codes in reasons for line in _wrap(f"{why}: {', '.join(codes)}.")]
    yield "\n".join(["Rules that were not judged", *lines])


def _section(
    last_step: LastStep, title: str, text: str, names: Sequence[str], rank: str
) -> Iterator[str]:
    of = last_step.measurement.of
    rows = {"model": last_step.model()}
    groups, layers = (of(kind, last_step.statistics) for kind in (Scope.group, Scope.layer))
    if len(groups) > 1:
        rows |= {f"group {name}": row for name, row in groups.items()}
    if len(layers) > 1 and layers.keys() != groups.keys() and rank in rows["model"]:
        ranks = {name: row.get(rank, -math.inf) for name, row in layers.items()}
        # NaN ranks first.
        worst = sorted(layers, key=lambda each: (ranks[each] == ranks[each], -ranks[each]))[:MOST]
        rows |= {f"layer {name}": layers[name] for name in worst}
    if not rows["model"].keys().isdisjoint(names):
        yield "\n".join([title, *_wrap(text), *_table(names, rows)])


def _eps_curve(last_step: LastStep) -> str:
    configured = {state.settings.eps for state in last_step.states}
    eps = sorted({*EPS_SHOWN, *(each for each in configured if each > 0)})
    lines, folded = [], {0.0: 0, 1.0: 0}
    for each, share in zip(eps, dominated_fractions(last_step.denominators(), eps), strict=True):
        if share in folded and each not in configured:
            folded[share] += 1
            continue
        bar = "█" * round(share * BAR_WIDTH) if math.isfinite(share) else ""
        mark = "  < configured" if each in configured else ""
        lines.append(f"  {_number(each):>6} {_fraction(share):>6} {bar}{mark}".rstrip())
    lines += [f"  {n} other values of eps: {share:.0%}" for share, n in folded.items() if n]
    return "\n".join(["Elements whose √v̂ is below eps, for different values of eps", *lines])


def _other_eps(last_step: LastStep) -> str:
    configured = sorted({state.settings.eps for state in last_step.states})
    exponent = round(math.log10(configured[0])) if configured[0] > 0 else -8
    values = {float(f"1e{exponent + each}") for each in EPS_EXPONENTS} | ({configured[0]} - {0.0})
    rows = {}
    for eps in sorted(values, reverse=True):
        name, row = _row_after(
            last_step, EPS_TABLE, _number(eps), [eps] == configured, with_eps(eps)
        )
        rows[name] = row
    title = "The last update under other values of eps"
    return "\n".join([title, *_table(EPS_TABLE, rows, "eps")])


def _other_dtypes(last_step: LastStep) -> str:
    states = last_step.states
    own = {each.dtype for each in (*states.parameter, *states.exp_avg)}
    rows, notes = {}, []
    for dtype in DTYPES:
        change, text = in_dtype(dtype), dtype_name(dtype)
        name, row = _row_after(last_step, DTYPE_TABLE, text, own == {dtype}, change)
        rows[name] = row
        if any(rounds_to_0(each.settings.eps, dtype) for each in states):
            notes.append(f"  eps rounds to 0 in {text}: the step is NaN where v is 0.")
            rows[name] = {key: value for key, value in row.items() if key not in UPDATE}
    title = "The last step with parameters and moments in other dtypes"
    return "\n".join([title, *_table(DTYPE_TABLE, rows, "dtype"), *notes])


def _row_after(
    last_step: LastStep, names: Sequence[str], value: str, is_configured: bool, change: Change
) -> tuple[str, Mapping[str, float]]:
    """Returns the title and the statistics of a row after a change."""
    if is_configured:
        return f"{value} (configured)", last_step.model()
    statistics = [each for each in last_step.statistics if each.name in names]
    measurement = measure(last_step.states, statistics, change)
    return value, measurement.of(Scope.model, statistics).get("model", {})


def _table(
    names: Iterable[str], rows: Mapping[str, Mapping[str, float]], title: str = ""
) -> list[str]:
    """Returns a table of statistics, with `·` for undefined ones and rows of 0% combined."""
    names = [name for name in names if any(name in row for row in rows.values())]
    cells = {row: [_cell(values, name) for name in names] for row, values in rows.items()}
    titles = [TITLES[name] for name in names]
    zeros = [row for row, texts in cells.items() if {*texts} == {"0%"}]
    if len(zeros) == len(rows):
        return _wrap(f"{'; '.join(titles)}: 0%")
    folded = zeros if len(zeros) > 1 else []
    shown = [[_truncate(row), *texts] for row, texts in cells.items() if row not in folded]
    widths = [max(map(len, column)) for column in zip([title, *titles], *shown, strict=True)]
    return [
        *(
            "  "
            + "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [[title, *titles], *shown]
        ),
        *[f"  {len(folded)} other rows: 0%"] * bool(folded),
    ]


def _cell(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return "·"
    is_fraction = STATISTICS.get(name, UNDERFLOWED).unit == "fraction"
    return _fraction(values[name]) if is_fraction else _number(values[name])


def _truncate(name: str) -> str:
    scope, _, rest = name.rpartition(" ")
    room = MAX_NAME - len(scope)
    return name if len(name) <= MAX_NAME else f"{scope} …{rest[1 - room :]}".strip()


def _number(value: float) -> str:
    return f"{value:.3g}"


def _fraction(value: float) -> str:
    """Returns a fraction in percent. Only exact 0 and 1 become 0% and 100%.

    Example:
        >>> _fraction(0.0), _fraction(1e-6), _fraction(0.12345), _fraction(0.99999), _fraction(1.0)
        ('0%', '<0.1%', '12.3%', '>99.9%', '100%')
    """
    if value in (0, 1) or not math.isfinite(value):
        return f"{value:.0%}"
    if value < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < value < 1 else f"{value:.1%}"


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({dtype_name(each.dtype) for each in tensors}))


def _wrap(text: str, indent: int = 2, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * max(indent, hanging),
        break_on_hyphens=False,
    )
