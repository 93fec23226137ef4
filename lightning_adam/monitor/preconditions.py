"""Checks before the first step what can be measured and logged."""

from collections.abc import Iterable, Iterator, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adam._compat.torch import is_flat_parameter
from lightning_adam.config.errors import ConfigError, ConfigPath
from lightning_adam.config.monitor import Kernel, MonitorConfig
from lightning_adam.monitor.loggers import is_wandb
from lightning_adam.monitor.publishing import takes_histograms
from lightning_adam.monitor.tracked_optimizer import TrackedOptimizer
from lightning_adam.optim.console import log_info
from lightning_adam.statistics.columns import Capabilities
from lightning_adam.statistics.kernels import FAST, is_installed, missing, will_compile
from lightning_adam.statistics.measurement import Measurement
from lightning_adam.statistics.selection import KERNEL_PACKAGES
from lightning_adam.statistics.sharding import unwrap_wrapper
from lightning_adam.statistics.state_reader import is_measurable


def torch_optimizers(trainer: Trainer) -> list[Optimizer]:
    """Returns the optimizers of a trainer without wrappers of Lightning or Accelerate."""
    return [unwrap_wrapper(each) for each in trainer.optimizers]


def check(trainer: Trainer, config: MonitorConfig, path: ConfigPath) -> None:
    """Raises if nothing can be measured, and reports what will not be measured or logged.

    Args:
        trainer: The trainer, before its first step.
        config: The monitor's config.
        path: Config path of the monitor, for errors.

    Raises:
        ConfigError: If no optimizer is of Adam's family, the kernel does not support the device of
            the parameters, or FSDP1 has replaced the parameters by flat ones.
    """
    optimizers = torch_optimizers(trainer)
    others = [type(each).__name__ for each in optimizers if not is_measurable(each)]
    foreign = [each for each in optimizers if not isinstance(each, Optimizer)]
    if foreign:
        rank_zero_warn(
            f"AdamMonitor cannot measure {type(foreign[0]).__name__}: it is not a torch optimizer."
            " DeepSpeed keeps parameters, gradients and state in its own partitions. Use FSDP2"
            " (ModelParallelStrategy) to measure a sharded run."
        )
    elif len(others) == len(optimizers):
        raise ConfigError(
            "AdamMonitor needs an Adam-like optimizer, with betas. The model trains with"
            f" {', '.join(others) or 'no optimizer'}",
            "Use torch.optim.Adam or AdamW (AdamMixin builds them), or remove the callback",
        )
    if any(map(is_flat_parameter, _parameters(optimizers))):
        raise ConfigError(
            "AdamMonitor needs the original parameters, but FSDP1 trains flat ones",
            "Use FSDPStrategy(use_orig_params=True), or remove the callback",
        )
    _check_kernel(optimizers, config.kernel.value, path)
    if others and not foreign:
        log_info(
            f"AdamMonitor measures optimizers with betas. It does not measure {', '.join(others)}."
        )
    _check_loggers(trainer, config)


def _check_kernel(optimizers: Iterable[Optimizer], kernel: str, path: ConfigPath) -> None:
    """Raises if the requested kernel does not work or does not support the device."""
    if kernel not in KERNEL_PACKAGES:
        return
    if not is_installed(kernel):
        problem = f"does not work here: pip install --upgrade {KERNEL_PACKAGES[kernel]}"
        raise (path / "kernel").invalid(kernel, problem, "auto")
    types = device_types(filter(is_measurable, optimizers))
    if kernel not in {FAST.get(each) for each in types}:
        problem = f"does not support the device of the parameters, {', '.join(sorted(types))}"
        raise (path / "kernel").invalid(kernel, problem, "auto")


def _check_loggers(trainer: Trainer, config: MonitorConfig) -> None:
    loggers = trainer.loggers
    if not loggers:
        rank_zero_warn(
            "AdamMonitor has no logger: its numbers are in trainer.callback_metrics only."
            " Give the Trainer one, such as WandbLogger(offline=True)."
        )
    elif config.histograms_every_n_steps and not any(map(takes_histograms, loggers)):
        rank_zero_warn("AdamMonitor's histograms need a WandbLogger or a TensorBoardLogger.")
    if config.layer_table and not any(map(is_wandb, loggers)):
        rank_zero_warn("AdamMonitor's layer_table needs a WandbLogger.")


def announce_compilation(tracked: Sequence[TrackedOptimizer], kernel: str) -> None:
    """Logs a message if the first measurement compiles the CPU kernel."""
    if will_compile(device_types(each.optimizer for each in tracked), kernel):
        log_info("AdamMonitor compiles its CPU kernel once; this takes about 10 s.")


def warn_unsupported(
    tracked: TrackedOptimizer, measurement: Measurement, config: MonitorConfig
) -> None:
    """Logs after the first measurement what is not measured of an optimizer, or slowly.

    Args:
        tracked: The optimizer.
        measurement: The measurement.
        config: The monitor's config.
    """
    name, statistics = type(tracked.optimizer).__name__, tracked.statistics
    reason = "quantized, with a sparse gradient, or without an exp_avg of their shape"
    if measurement.is_empty:
        log_info(
            f"AdamMonitor measures nothing of {name}: all parameters are {reason}, or the step"
            " left no gradient."
        )
        return
    kernels = missing(device_types([tracked.optimizer])) if config.kernel is Kernel.auto else []
    for kernel in kernels:
        log_info(
            f"AdamMonitor measures {name} many times faster with {kernel}:"
            f" pip install {KERNEL_PACKAGES[kernel]}"
        )
    unsupported = [each.name for each in statistics.not_measured]
    if config.histograms_every_n_steps and Capabilities.STEP not in measurement.capabilities:
        unsupported.append("histograms")
    if statistics.skipped:
        skipped = statistics.skipped
        unsupported.append(f"{len(skipped)} parameters {reason}, such as {skipped[0]}")
    if unsupported:
        log_info(
            f"AdamMonitor does not measure everything of {name}: its state does not provide"
            f" {', '.join(unsupported)}."
        )


def device_types(optimizers: Iterable[Optimizer]) -> set[str]:
    """Returns the device types of the parameters."""
    return {parameter.device.type for parameter in _parameters(optimizers)}


def _parameters(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
