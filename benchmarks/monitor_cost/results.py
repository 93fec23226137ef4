"""What `monitor_cost.json` records: the names of the arms, and their numbers."""

from typing import TypedDict

STEP = "fused step"
STEP_AGAIN = "fused step again"
READ = "plain read"
READ_AGAIN = "plain read again"
HEADLINE = "headline"
ALL = "all"
HISTOGRAMS = "all + histograms"
EAGER = "all, eager"
COMPOSER = "Composer"
OLMO = "OLMo"
WATCH = "wandb.watch"
STEPS = (STEP, STEP_AGAIN)
OURS = (HEADLINE, ALL, HISTOGRAMS, EAGER)
MATRICES = "matrix products"

HEALTHY = "healthy"
NONE = "none"
NONE_AGAIN = "none again"


class Arm(TypedDict):
    milliseconds: list[float]
    ratios: list[float]
    """To the fused step of the same round."""
    extra_mb: float | None
    """How far one call makes the peak of memory rise; None where the system does not tell."""
    launches: int | None
    """Kernels on the device; None on the CPU."""
    device_ms: float | None
    """Time of these kernels; None on the CPU."""
    host_ms: float | None
    """Time until the host has started them, without waiting; None on the CPU and for others."""


class Size(TypedDict):
    elements: int
    tensors: int
    arms: dict[str, Arm]
    after: dict[str, dict[str, list[float]]]
    """What follows, by what was before: its ratio to the same after a plain read."""


class StepPart(TypedDict):
    command: str
    machine: str
    in_between: dict[str, list[float]]
    """Microseconds that a step gets longer by."""
    inputs: dict[str, list[float]]
    """Ratios of a measurement to that of a healthy input."""
    sizes: dict[str, Size]


class Segments(TypedDict):
    milliseconds: list[float]
    """The median batch."""
    medians: list[float]
    totals: list[float]
    """Ratios to the segment of the same round that was not monitored."""
    measurement_ms: list[float]
    """What all batches got longer by, for each measurement; of no rounds where none was taken."""


class TrainingPart(TypedDict):
    command: str
    machine: str
    batches: int
    logger: str
    workloads: dict[str, dict[str, Segments]]


class Results(TypedDict):
    """By device."""

    step: dict[str, StepPart]
    training: dict[str, TrainingPart]
