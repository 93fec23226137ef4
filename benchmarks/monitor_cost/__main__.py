"""What does it cost to look inside Adam: one measurement, a step in between, a whole training?

python -m benchmarks.monitor_cost
python -m benchmarks.monitor_cost --part step --sizes resnet18 small --rounds 11
python -m benchmarks.monitor_cost --part training --workloads mnist
python -m benchmarks.monitor_cost --sizes tiny --workloads tiny --rounds 2 --training-rounds 2
python -m benchmarks.monitor_cost --save benchmarks

The part `step` takes the tensors of a model, without the model, and divides what each arm takes by
torch's fused AdamW step of the same round. The part `training` trains with a real Trainer, and
divides each segment by that of the same round that was not monitored. In both, the arms take turns
in one process, in another order each round, so that what else the machine does falls on all alike;
what is reported is the median of the ratios. An arm that is there twice shows the noise: what is
smaller than its spread is not known.

With `--save FOLDER` the numbers are kept in `monitor_cost.json`, beside those that an earlier call
has left there of other parts and devices; a picture is drawn of them, and the tables are put into
the folder's README.md, between its markers.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
import wandb

from benchmarks.monitor_cost.in_between import in_between
from benchmarks.monitor_cost.inputs import measure_inputs
from benchmarks.monitor_cost.machine import machine
from benchmarks.monitor_cost.results import Results, Size, StepPart, TrainingPart
from benchmarks.monitor_cost.saving import save
from benchmarks.monitor_cost.step import measure_size
from benchmarks.monitor_cost.tables import report
from benchmarks.monitor_cost.tensors import SHAPES
from benchmarks.monitor_cost.training import TRAININGS, logger_of, train
from benchmarks.quiet import quieten


def main() -> None:
    typed = arguments()
    if typed.threads:
        torch.set_num_threads(typed.threads)
    quieten()
    os.environ |= {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    command = shlex.join(["python", "-m", "benchmarks.monitor_cost", *sys.argv[1:]])
    results = Results(step={}, training={})
    here = machine(typed.device)
    print(f"{command}\n{here}", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {"WANDB_DATA_DIR": folder, "WANDB_DIR": folder}
        if "step" in typed.part:
            sizes: dict[str, Size] = {}
            results["step"][typed.device] = StepPart(
                command=command,
                machine=here,
                in_between=in_between(typed.rounds, folder),
                inputs=measure_inputs(typed.device, typed.rounds),
                sizes=sizes,
            )
            for size in typed.sizes:
                sizes[size] = measure_size(size, typed.device, typed.rounds)
                # The next takes long, and may be broken off.
                save(results, typed.save)
        if "training" in typed.part:
            logger = logger_of(typed.logger, folder)
            results["training"][typed.device] = TrainingPart(
                command=command,
                machine=here,
                batches=typed.batches,
                logger=typed.logger,
                workloads={
                    name: train(name, typed.device, typed.training_rounds, typed.batches, logger)
                    for name in typed.workloads
                },
            )
        wandb.finish()
    save(results, typed.save)
    print(report(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor_cost",
        description=str(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part",
        nargs="+",
        choices=["step", "training"],
        default=["step", "training"],
        help="what is measured (default: both)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SHAPES,
        help="whose tensors, in the part `step`; tiny only tries the benchmark itself"
        " (default: resnet18 gpt2 small, on CUDA 1B too)",
    )
    parser.add_argument("--rounds", type=int, default=21, help="of the part `step` (default: 21)")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=TRAININGS,
        default=["mnist", "gpt"],
        help="what is trained; tiny only tries the benchmark itself (default: mnist gpt)",
    )
    parser.add_argument(
        "--training-rounds", type=int, default=8, help="of the part `training` (default: 8)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=50,
        help="of a segment; a multiple of 50, or `every 50` is measured too seldom (default: 50)",
    )
    parser.add_argument(
        "--logger",
        choices=["wandb", "csv"],
        default="wandb",
        help="of the workloads; wandb is offline (default: wandb)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what it runs on (default: cpu)"
    )
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="keep the numbers, a picture and the tables there, as in `--save benchmarks`"
        " (default: they are only printed)",
    )
    typed = parser.parse_args()
    if min(typed.rounds, typed.training_rounds, typed.batches) < 1:
        parser.error("expected at least one round and one batch")
    if typed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out")
    if typed.sizes is None:
        typed.sizes = ["resnet18", "gpt2", "small"] + ["1B"] * (typed.device == "cuda")
    return typed


if __name__ == "__main__":
    main()
