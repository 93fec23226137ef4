"""Does each fault raise its finding, and nothing else one?

python -m benchmarks.findings
python -m benchmarks.findings --only eps float16 --every-n-steps 1

One row a run of `benchmarks/planted_faults.py` and `benchmarks/healthy_runs.py`, one column a rule.
A cell has the severity (E error, W warning, i info, which is stored only) and the step at which the
finding was raised; `missed` where it should have been, and `!` where it should not.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from tqdm import tqdm

from benchmarks.healthy_runs import HEALTHY
from benchmarks.planted_faults import EVERY_N_STEPS, RUNS, Verdict, judge
from lightning_adam.config.monitor import Severity
from lightning_adam.findings import RULES
from lightning_adam.findings.finding import Finding

BY_NAME = {run.name: run for run in [*RUNS, *HEALTHY]}
LETTERS = {Severity.error: "E", Severity.warning: "W", Severity.info: "i"}


def cell(verdict: Verdict, code: str) -> str:
    """What a run has to say of a rule."""
    found = [each for each in verdict.findings if each.code == code]
    if not found:
        return "missed" if code in verdict.missed else ""
    first = next((each for each in found if each.is_above_info), found[0])
    return f"{LETTERS[first.severity]} {first.step}{'!' if code in verdict.wrong else ''}"


def table(verdicts: Sequence[Verdict]) -> str:
    """One row a run, one column a rule; the rules' names are written one word below the other."""
    codes = [code for code in RULES if any(cell(each, code) for each in verdicts)]
    words = {code: code.split("_") for code in codes}
    rows = {each.run.name: [cell(each, code) for code in codes] for each in verdicts}
    height = max((len(each) for each in words.values()), default=0)
    heads = [
        [each[line] if line < len(each) else "" for each in words.values()]
        for line in range(height)
    ]
    lines = [*heads, *rows.values()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(codes))]
    first = max(map(len, rows), default=0)
    names = [*[""] * height, *rows]
    return "\n".join(
        "  ".join([name.ljust(first), *map(str.ljust, line, widths)]).rstrip()
        for name, line in zip(names, lines, strict=True)
    )


def conclusion(verdicts: Sequence[Verdict]) -> list[str]:
    """What did not hold, or that all did."""
    lines = []
    for each in verdicts:
        if each.missed:
            lines.append(f"{each.run.name}: expected {', '.join(sorted(each.missed))}, not raised")
        for finding in each.findings:
            if finding.code in each.wrong:
                evidence = ", ".join(
                    f"{name} {value:.3g}" for name, value in finding.evidence.items()
                )
                lines.append(
                    f"{each.run.name}: {finding.code} of the {finding.scope} at step {finding.step}"
                    f" was not expected ({evidence})"
                )
    holds = "every fault raised its finding, no control and no healthy run raised one"
    return lines or [holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose name contains one")
    parser.add_argument("--every-n-steps", type=int, default=EVERY_N_STEPS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    chosen = parser.parse_args()
    names = [
        name for name in BY_NAME if not chosen.only or any(each in name for each in chosen.only)
    ]
    if not names:
        listed = "\n".join(BY_NAME)
        parser.error(f"--only {' '.join(chosen.only)}: expected parts of these names\n{listed}")
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, spawn, partial(torch.set_num_threads, 1)) as pool:
        judged = pool.map(partial(_judge, every_n_steps=chosen.every_n_steps), names)
        rows = tqdm(judged, total=len(names), unit="run", disable=not sys.stderr.isatty())
        verdicts = [
            Verdict(BY_NAME[name], findings) for name, findings in zip(names, rows, strict=True)
        ]
    print(table(verdicts))
    print(f"\n{len(names)} runs in {time.perf_counter() - start:.0f} s")
    print("\n".join(conclusion(verdicts)))
    return 0 if all(each.holds for each in verdicts) else 1


def _judge(name: str, every_n_steps: int) -> list[Finding]:
    # The builders cannot be sent to another process.
    return [*judge(BY_NAME[name], every_n_steps).findings]


if __name__ == "__main__":
    sys.exit(main())
