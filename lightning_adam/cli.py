"""The command `lightning-adam`."""

import argparse
import inspect
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_adam.config.errors import ConfigError, nearest
from lightning_adam.config.explain import TOPICS, explain
from lightning_adam.findings import RULES
from lightning_adam.findings.describe import explain_rule
from lightning_adam.findings.preflight import NOTICES
from lightning_adam.statistics.catalogue import STATISTICS, SYMBOLS, explain_statistic, select
from lightning_adam.statistics.histograms import QUANTITIES, fold
from lightning_adam.version import __version__

if TYPE_CHECKING:
    from lightning_adam.reports.runs import Run

MAX_LISTED_RUNS = 10
"""`report` prints one line per run up to this number, and a summary of more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The arguments of the command (default: None, those of the command line).

    Example:
        >>> main(["explain", "monitor"])  # doctest: +ELLIPSIS
        lightning_adam/monitor=default
        The arguments of `lightning_adam.AdamMonitor`.
        ...
          adam_monitor.every_n_steps=null
              Measure the first optimizer step and every n-th ...
    """
    parser = argparse.ArgumentParser(
        prog="lightning-adam", description="Adam for PyTorch Lightning, configured from Hydra."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    explain_parser = commands.add_parser(
        "explain",
        help="explain settings, statistics and findings",
        description="Prints the settings of a config with their defaults and meanings, the"
        " definition of a statistic, or the condition and the suggestions of a finding.",
    )
    explain_parser.add_argument(
        "topic",
        type=_topic,
        metavar="TOPIC",
        help=f"{', '.join(TOPICS)}, statistics, histograms, findings, or the name of one statistic"
        " or finding",
    )
    explain_parser.set_defaults(run=lambda chosen: chosen.topic)
    report_parser = commands.add_parser(
        "report",
        help="write an HTML report of runs from W&B, CSVLogger or TensorBoard",
        description="Writes an HTML report of one run, or a comparison of several. The report loads"
        " nothing from the network. An existing file is overwritten.",
        epilog="examples:\n"
        "  lightning-adam report lightning_logs/version_3\n"
        "  lightning-adam report wandb/offline-run-* -o compared.html\n"
        "  lightning-adam report lightning_logs/version_3 --watch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report_parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="folder of a run, which AdamMonitor prints at the end, or a folder that contains runs",
    )
    report_parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the file to write (default: report.html)",
    )
    report_parser.add_argument(
        "--watch",
        nargs="?",
        const=10.0,
        type=_seconds,
        metavar="SECONDS",
        help="rewrite the report until all runs have ended or you press Ctrl-C; the open page"
        " reloads itself (default: every 10 seconds)",
    )
    report_parser.set_defaults(run=_report)
    dashboard_parser = commands.add_parser(
        "dashboard",
        help="create or update a W&B workspace with charts of AdamMonitor",
        description="Creates a workspace with charts of AdamMonitor in a W&B project, or updates"
        " it, and prints its address.",
    )
    dashboard_parser.add_argument(
        "project", metavar="ENTITY/PROJECT", help="as in the address of the project"
    )
    dashboard_parser.add_argument(
        "--metric",
        metavar="NAME",
        help="metric to compare runs by, for example val/acc (default: that of the newest run; none"
        " with --json)",
    )
    dashboard_parser.add_argument(
        "--json", action="store_true", help="print the workspace as JSON, and contact no server"
    )
    dashboard_parser.set_defaults(run=_dashboard)
    inspect_parser = commands.add_parser(
        "inspect",
        help="inspect the optimizer state of a checkpoint",
        description="Prints the findings and statistics of the last optimizer step in a Lightning"
        " checkpoint, or in an optimizer's state_dict saved with torch.save. It needs neither the"
        " model's code nor a run, and executes no code from the file.",
    )
    inspect_parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="the file, for example last.ckpt"
    )
    inspect_parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a report page (default: none)"
    )
    inspect_parser.set_defaults(run=_inspect)
    chosen = parser.parse_args(arguments)
    try:
        print(chosen.run(chosen), flush=True)  # noqa: T201
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Without this, Python fails again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, ModuleNotFoundError) as error:
        parser.exit(1, f"lightning-adam {chosen.command}: {error}\n")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text} is not a number of seconds. Put the folders before --watch"
    )


def _report(chosen: argparse.Namespace) -> str:
    from lightning_adam.reports.report import write_report
    from lightning_adam.reports.runs import read_runs
    from lightning_adam.reports.watch import watch_report

    if chosen.watch:
        watch_report(chosen.runs, chosen.output, chosen.watch, partial(print, flush=True))
        return f"report: {chosen.output}"
    runs = read_runs(chosen.runs)
    write_report(runs, chosen.output)
    notes = [note for run in runs for note in run.notes]
    notes += [
        f"{run.name} has no keys that begin with adam_; train with callbacks=[AdamMonitor()]."
        for run in runs
        if not run.is_monitored and not run.notes
    ]
    return "\n".join([*_describe(runs), *notes, f"report: {chosen.output}"])


def _describe(runs: Sequence["Run"]) -> list[str]:
    """Returns lines that name the runs that were read."""
    if len(runs) > MAX_LISTED_RUNS:
        sources = Counter(run.source for run in runs).items()
        return [f"read {len(runs)} runs ({', '.join(f'{n} {source}' for source, n in sources)})"]
    lines, here = [], Path.cwd()
    for run in runs:
        path = run.path.relative_to(here) if run.path.is_relative_to(here) else run.path
        steps = "no rows yet" if run.last_step is None else f"up to step {run.last_step:,}"
        keys = len({*run.series, *run.histograms})
        lines.append(f"read {path} ({run.source}: {keys:,} keys, {steps})")
    return lines


def _dashboard(chosen: argparse.Namespace) -> str:
    from lightning_adam.reports.workspace import save_workspace, workspace_spec

    create = workspace_spec if chosen.json else save_workspace
    return create(chosen.project, chosen.metric)


def _inspect(chosen: argparse.Namespace) -> str:
    from lightning_adam.reports.inspection.inspection import inspect
    from lightning_adam.reports.inspection.text import describe_inspection

    inspection = inspect(chosen.checkpoint)
    text = describe_inspection(inspection)
    if chosen.html is None:
        return text
    from lightning_adam.reports.inspection.run import run_of
    from lightning_adam.reports.report import write_report

    write_report([run_of(inspection)], chosen.html)
    return f"{text}\n\nreport: {chosen.html}"


def _topic(name: str) -> str:
    """Returns the explanation of a topic, a statistic or a finding."""
    if name in TOPICS:
        return "\n\n".join(map(explain, TOPICS[name]))
    if name == "histograms":
        shown = [f"adam_histogram/{key}\n    {meaning}" for key, meaning in QUANTITIES.items()]
        return "\n\n".join([*shown, inspect.cleandoc(fold.__doc__ or "").partition("\n\nArgs")[0]])
    if name == "findings":
        return "\n\n".join(
            [*map(explain_rule, RULES.values()), *map(explain_rule, NOTICES.values()), SYMBOLS]
        )
    chosen = select(["all" if name == "statistics" else name])
    found = RULES.get(name) or NOTICES.get(name)
    rules = [] if found is None else [explain_rule(found)]
    if not chosen and not rules:
        topics = [*TOPICS, "statistics", "histograms", "findings"]
        close = nearest(name, [*topics, *STATISTICS, *RULES, *NOTICES], 1)
        raise argparse.ArgumentTypeError(
            f"{name} is not a topic ({', '.join(topics)}), a statistic or a finding. Use for"
            f" example lightning-adam explain {(close or ['statistics'])[0]}"
        )
    return "\n\n".join([*rules, *map(explain_statistic, chosen), SYMBOLS])
