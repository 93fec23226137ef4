"""Hyperparameter search for Adam: the package's method beside others, on seven small apps.

python -m benchmarks.tuning --seeds 5 --budgets 7 20
python -m benchmarks.tuning --table

All runs and searches are kept in outputs/tuning, so that the same command continues where it was
interrupted. The configuration that a search chooses is trained with fresh seeds.
"""

import argparse
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import optuna
import torch
from tqdm import tqdm

from benchmarks.tuning.apps import APPS, STARTS
from benchmarks.tuning.methods import METHODS
from benchmarks.tuning.results import tables
from benchmarks.tuning.searches import Task, collect, quieten, search

RESULTS = Path(__file__).with_name("results.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, known in (("apps", APPS), ("starts", STARTS), ("methods", METHODS)):
        parser.add_argument(f"--{name}", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--seeds", type=int, default=5, help="searches of each kind (default: 5)")
    parser.add_argument("--budgets", nargs="+", type=int, default=[7, 20, 40])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("outputs/tuning"))
    parser.add_argument("--table", action="store_true", help="print what is complete, run nothing")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(app, start, method, budget, seed)
        for seed in range(args.seeds)
        for budget in args.budgets
        for method in args.methods
        for app in args.apps
        for start in args.starts
    ]
    if not args.table:
        context = get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context, initializer=quieten) as pool:
            futures = [pool.submit(search, task, args.folder) for task in tasks]
            for future in tqdm(as_completed(futures), total=len(futures), unit="search"):
                future.result()
    losses, defaults = collect(tasks, args.folder)
    print(tables(losses, defaults))
    if args.save:
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "optuna": optuna.__version__,
        }
        results = {"machine": machine, "defaults": defaults, "losses": losses}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
