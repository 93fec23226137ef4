"""The results as tables, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles

from benchmarks.monitor_cost.results import (
    ALL,
    NONE,
    READ_AGAIN,
    STEP,
    Arm,
    Results,
    Size,
    TrainingPart,
)

ON = {"cpu": "", "cuda": " on CUDA"}
"""How a heading names what it was measured on."""
TARGET_US = 4.0
"""The largest cost of a step without a measurement that is acceptable, in microseconds."""


ON_DEVICE = ("kernel launches", "host only, ms", "device only, ms")
"""Columns of an accelerator."""
LIMIT = 4.0
"""What a measurement of any input may cost, relative to that of a healthy one."""


def report(results: Results) -> str:
    """All tables, in Markdown."""
    parts = []
    for device, step in results["step"].items():
        on = ON[device]
        parts += [f"### One measurement{on}", source(step["command"], step["machine"])]
        parts += [size_table(name, size) for name, size in step["sizes"].items()]
        parts += [f"### The step after{on}", after_table(step["sizes"])]
        if step["inputs"]:
            parts += [f"### Any input{on}", inputs_table(step["inputs"])]
        parts += [f"### A step in between{on}", in_between_table(step["in_between"])]
    for device, training in results["training"].items():
        parts += [f"### A training{ON[device]}", source(training["command"], training["machine"])]
        parts += [training_table(training)]
    return "\n\n".join(parts)


def source(command: str, where: str) -> str:
    return f"`{command}`\n\n{where}"


def size_table(name: str, size: Size) -> str:
    arms = sorted(size["arms"].items(), key=lambda item: median(item[1]["ratios"]))
    on_device = any(arm["launches"] is not None for _, arm in arms)
    head = ["", "ratio to the fused step", "10th to 90th percentile", "ms", "extra MB", "rounds"]
    rows = [
        [
            arm_name,
            f"{median(arm['ratios']):.2f}",
            spread(arm["ratios"]) if arm_name != STEP else "",
            f"{median(arm['milliseconds']):.4g}",
            "not known" if arm["extra_mb"] is None else f"{arm['extra_mb']:.1f}",
            str(len(arm["ratios"])),
            *(
                map(number, (arm["launches"], arm["host_ms"], arm["device_ms"]))
                if on_device
                else []
            ),
        ]
        for arm_name, arm in arms
    ]
    return f"**{title(name, size)}**\n\n" + table([*head, *(ON_DEVICE if on_device else [])], rows)


def on_device_cells(arm: Arm) -> list[str]:
    return [*map(number, (arm["launches"], arm["host_ms"], arm["device_ms"]))]


def after_table(sizes: Mapping[str, Size]) -> str:
    names = {READ_AGAIN: "another plain read", ALL: "a measurement of `all`"}
    rows = [
        [size, what, names[before], f"{median(ratios):.3f}", spread(ratios, 3)]
        for size, of in sizes.items()
        for what, befores in of["after"].items()
        for before, ratios in befores.items()
    ]
    head = ["", "what follows", "after", "ratio to that after a plain read"]
    return table([*head, "10th to 90th percentile"], rows)


def inputs_table(inputs: Mapping[str, list[float]]) -> str:
    rows = [[name, f"{median(values):.2f}", spread(values)] for name, values in inputs.items()]
    head = ["a million elements", "ratio to a healthy input", "10th to 90th percentile"]
    return f"The limit is {LIMIT:g}.\n\n" + table(head, rows)


def in_between_table(in_between: Mapping[str, list[float]]) -> str:
    rows = [[name, f"{median(values):.2f}", spread(values)] for name, values in in_between.items()]
    return (
        "Microseconds that a step takes longer with an AdamMonitor that is not due; the target is"
        f" {TARGET_US:g}.\n\n" + table(["", "µs", "10th to 90th percentile"], rows)
    )


def training_table(part: TrainingPart) -> str:
    rows = [
        [
            f"{name}: {arm}",
            f"{median(own['milliseconds']):.2f}",
            f"{median(own['totals']):.3f}",
            spread(own["totals"], 3) if arm != NONE else "",
            f"{median(own['medians']):.3f}",
            spread(own["medians"], 3) if arm != NONE else "",
            f"{median(own['measurement_ms']):.2f}" if own["measurement_ms"] else "",
        ]
        for name, arms in part["workloads"].items()
        for arm, own in arms.items()
    ]
    head = ["", "median batch, ms", "all batches", "10th to 90th percentile", "median batch"]
    head += ["10th to 90th percentile", "ms for a measurement"]
    rounds = {len(own["totals"]) for arms in part["workloads"].values() for own in arms.values()}
    return (
        f"Ratios to the segment without a monitor of the same round; {max(rounds)} rounds of"
        f" {part['batches']} batches, logged to {part['logger']}.\n\n" + table(head, rows)
    )


def title(name: str, size: Size) -> str:
    step = median(size["arms"][STEP]["milliseconds"])
    return (
        f"{name}: {size['elements'] / 1e6:,.4g} million elements in {size['tensors']:,} tensors,"
        f" fused step {step:.3g} ms"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th."""
    if len(values) == 1:
        return values[0], values[0]
    first, *_, last = quantiles(values, n=10, method="inclusive")
    return first, last


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = percentiles(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"
