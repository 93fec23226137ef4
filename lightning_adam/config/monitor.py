"""The config of `AdamMonitor`."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from lightning_adam.config.errors import ConfigPath
from lightning_adam.config.parsing import (
    BaseConfig,
    Choice,
    Count,
    Example,
    Integer,
    ParsedConfig,
    locate,
    to_dict,
    validate,
)


class Scope(Choice):
    """The set of tensors that a statistic describes."""

    model = "model"
    """All tensors of the optimizer."""
    group = "group"
    """One parameter group."""
    layer = "layer"
    """The tensors of one module."""
    tensor = "tensor"
    """One parameter."""


class Kernel(Choice):
    """The implementation that reads the tensors of a measurement."""

    auto = "auto"
    """The fast kernel of each device, if it is installed."""
    eager = "eager"
    """Plain torch operations in float64 on any device: the reference, many times slower."""
    numba = "numba"
    """Compiled for the CPU; `pip install 'lightning-adam[cpu]'`."""
    triton = "triton"
    """Compiled for CUDA; installed with torch there."""


class Severity(Choice):
    """How a finding is reported."""

    off = "off"
    """Not checked."""
    info = "info"
    """Stored, not printed."""
    warning = "warning"
    """Costs performance now or soon."""
    error = "error"
    """Adam does not work as intended."""


@dataclass
class MonitorConfig(BaseConfig):
    """The arguments of `lightning_adam.AdamMonitor`.

    Example:
        >>> [scope.value for scope in MonitorConfig().scopes]
        ['model']
    """

    _target_: str = "lightning_adam.AdamMonitor"
    """The class (default: lightning_adam.AdamMonitor; Hydra's instantiate)."""
    every_n_steps: Annotated[Count, Example(50)] | None = None
    """Measure the first optimizer step and every n-th (default: null, the trainer's
    `log_every_n_steps`; lightning_adam)."""
    scopes: list[Scope] = field(default_factory=lambda: [Scope.model])
    """Sets of tensors to describe: `model`, `group`, `layer`, `tensor` (default: [model];
    lightning_adam)."""
    statistics: Any = "headline"
    """Statistics to measure: `headline`, `all`, or names and globs, `[headline,eps_*,update/*]`;
    `beta1`, `beta2`, `eps` and `weight_decay` are logged when they change (default: headline;
    `lightning-adam explain statistics`)."""
    layer_depth: Annotated[Count, Example(2)] | None = None
    """Number of parts of a module's path that form a layer's name: 2 gives `net.blocks` for
    `net.blocks.3.fc` (default: null, all; lightning_adam)."""
    worst: Annotated[dict[str, Integer], Example({"grad_norm": 5})] = field(default_factory=dict)
    """Number of tensors to log with the largest values of a statistic, whatever the scopes:
    `{eps_energy_loss:5}` (default: {}; lightning_adam)."""
    histograms_every_n_steps: Annotated[Count, Example(500)] | None = None
    """Count gradients, moments, denominators and normalized updates by binary exponent at the first
    optimizer step and every n-th: histograms for W&B and TensorBoard, percentiles for every logger
    (default: null, never; lightning_adam)."""
    layer_table: bool = False
    """Also log the statistics of every layer to the W&B table `adam_layers` (default: false;
    lightning_adam)."""
    findings: dict[str, Any] | None = field(default_factory=dict)
    """Settings of the rules by name: thresholds, `patience` in measurements, and `severity`
    (off, info, warning or error), such as `eps_dominates.threshold=0.2`; null disables all rules
    (default: {}, no changes; `lightning-adam explain findings`)."""
    stop_on: list[str] = field(default_factory=list)
    """Findings that stop training: `[not_finite]` (default: []; lightning_adam)."""
    alert: bool = False
    """Send a W&B alert for each finding above info, if the run is online (default: false;
    wandb.alert)."""
    flight_recorder: Annotated[Count, Example(200)] | None = None
    """Number of optimizer steps whose layer statistics are kept in memory, to be written to a file
    on a failure: a loss that jumps, a loss or statistic that is not finite, an exception, SIGTERM
    (default: null, off; lightning_adam)."""
    kernel: Kernel = Kernel.auto
    """Implementation that reads the tensors: `numba` on the CPU, `triton` on CUDA, `eager` on any
    device, many times slower (default: auto, the fast one if it is installed; lightning_adam)."""


def parse_monitor(node: Any, path: ConfigPath | None = None) -> ParsedConfig[MonitorConfig]:
    """Parses the monitor's config: names, types and ranges.

    Args:
        node: A composed Hydra node, a dict or a `MonitorConfig`.
        path: Its path (default: None, where the node is in its config, or `adam_monitor`).

    Raises:
        ConfigError: If a key is unknown or a value is out of range.

    Example:
        >>> parse_monitor({"every_n_steps": 10}).config.every_n_steps
        10
    """
    path = path or locate(node, "adam_monitor")
    return ParsedConfig(validate(MonitorConfig, to_dict(node, path), path), path)
