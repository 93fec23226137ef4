"""Does each suggestion improve the run that has the fault, and no healthy run suffer from it?

python -m benchmarks.suggestions
python -m benchmarks.suggestions --only eps decay

First table: one row for each suggestion of a planted fault in a training run, with the mean loss of
the last tenth before and after; of a sweep, the best. A suggestion that is more than a lead has to
improve the loss. Second table: for each healthy run, every suggestion that is more than a
lead and that a rule would make on its last measurement; none may make the run worse by more than
5 % of what it has learned, or by more than another seed does.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch.optim import Adam, AdamW
from tqdm import tqdm

from benchmarks.healthy_runs import HEALTHY
from benchmarks.planted_faults import FAULTY_TRAINING_RUNS, Run, Verdict, judge
from lightning_adam.findings.finding import Suggestion

TOLERANCE = 0.05
"""Share of the change of a healthy run's loss that counts as worse."""


class Row(NamedTuple):
    """A suggestion that was applied to a run."""

    run: str
    code: str
    suggestion: Suggestion
    before: float
    after: float
    is_resolved: bool


def changes_of(suggestion: Suggestion) -> list[dict[str, Any]]:
    """The arguments of a run's builder that stand for a suggestion's overrides, one dict a trial.

    Example:
        >>> changes_of(Suggestion(("optimizer.eps=1e-10",)))
        [{'eps': 1e-10}]
        >>> changes_of(Suggestion(("optimizer.lr=0.1,0.2",), is_sweep=True))
        [{'lr': 0.1}, {'lr': 0.2}]
    """
    trials: list[dict[str, Any]] = [{}]
    for each in OverridesParser.create().parse_overrides(list(suggestion.overrides)):
        _, _, name = each.key_or_group.rpartition(".")
        values = list(each.sweep_iterator()) if each.is_sweep_override() else [each.value()]
        values = [
            float(value) if isinstance(value, str) and name == "lr" else value for value in values
        ]
        trials = [{**trial, **_argument(name, value)} for trial in trials for value in values]
    return trials


def _argument(name: str, value: Any) -> Mapping[str, Any]:
    if name == "precision":
        # Mixed precision keeps parameters and state in float32.
        return {"dtype": torch.float32}
    if name == "gradient_clip_val":
        return {"clip": value}
    if name == "decoupled_weight_decay":
        return {"of": AdamW if value else Adam}
    return {name: value}


def try_out(verdict: Verdict, code: str, suggestion: Suggestion) -> Row | None:
    """Trains with a suggestion; None where the run's builder has no argument for it."""
    best: Verdict | None = None
    for changes in changes_of(suggestion):
        try:
            now = judge(verdict.run, **changes)
        except TypeError:
            return None
        if best is None or not now.loss >= best.loss:
            best = now
    if best is None:
        return None
    is_resolved = code not in {each.code for each in best.findings if each.is_above_info}
    return Row(verdict.run.name, code, suggestion, verdict.loss, best.loss, is_resolved)


def of_faults(runs: Iterable[Run]) -> list[Row]:
    """Applies the suggestions of each planted fault."""
    rows = []
    for run in runs:
        verdict = judge(run)
        raised = {each.code: each for each in verdict.findings if each.code in run.faults}
        for code, finding in raised.items():
            for suggestion in finding.suggestions:
                if suggestion.overrides:
                    row = try_out(verdict, code, suggestion)
                    if row is not None:
                        rows.append(row)
                        print(_line(row), flush=True)
    return rows


def of_healthy(runs: Iterable[Run]) -> list[Row]:
    """Applies what rules would suggest on the last measurement of each healthy run."""
    rows = []
    for run in runs:
        verdict = judge(run)
        for code, suggestion in verdict.possible:
            row = try_out(verdict, code, suggestion)
            if row is not None and row.after - row.before > TOLERANCE * abs(verdict.fall):
                # Another seed may differ as much.
                other = judge(run, seed=1)
                row = row._replace(before=max(row.before, other.loss))
                rows += [row] if row.after - row.before > TOLERANCE * abs(verdict.fall) else []
            if row is not None:
                print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    kind = "sweep" if row.suggestion.is_sweep else "lead" if row.suggestion.is_lead else "firm"
    state = "resolved" if row.is_resolved else "still raised"
    outcome = f"{row.before:8.4f} -> {row.after:8.4f}"
    return f"{row.run:42} {row.code:24} {kind:6} {outcome}  {state:13} {row.suggestion}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose name contains one")
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    def some(runs: Iterable[Run]) -> Any:
        named = [
            run for run in runs if not chosen.only or any(each in run.name for each in chosen.only)
        ]
        return tqdm(named, unit="run", disable=not sys.stderr.isatty())

    faults = of_faults(some(FAULTY_TRAINING_RUNS))
    print()
    worse = of_healthy(some(HEALTHY))
    useless = [
        row
        for row in faults
        if not row.suggestion.is_lead and math.isfinite(row.before) and row.after >= row.before
    ]
    print()
    print("\n".join(f"does not help: {_line(row)}" for row in useless) or "each suggestion helps")
    print("\n".join(f"worse: {_line(row)}" for row in worse) or "no healthy run is worse")
    return 1 if useless or worse else 0


if __name__ == "__main__":
    sys.exit(main())
