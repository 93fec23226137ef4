"""Validates the names in the monitor's config: statistics, rules and their settings."""

from collections.abc import Mapping
from math import isnan
from typing import Any

from lightning_adam.config.errors import ConfigPath, nearest
from lightning_adam.config.monitor import MonitorConfig, Severity, parse_monitor
from lightning_adam.findings import RULES
from lightning_adam.findings.preflight import NOTICES, Notice
from lightning_adam.findings.rule import Rule
from lightning_adam.statistics.selection import check_selection


def monitor_config(node: Any, path: ConfigPath | None = None) -> MonitorConfig:
    """Parses and validates the monitor's config.

    Args:
        node: A composed Hydra node, a dict, or a `MonitorConfig`.
        path: Config path of the node (default: None, found from the node, or `adam_monitor`).

    Raises:
        ConfigError: If a key or a name is unknown, a value is out of range, the kernel is not
            installed, or `stop_on` is not a list of findings.

    Example:
        >>> monitor_config({"every_n_steps": 10}).every_n_steps
        10
    """
    parsed = parse_monitor(node, path)
    check_selection(parsed)
    config, path = parsed.config, parsed.path
    config.findings = _rule_settings(config.findings, path / "findings")
    for code in config.stop_on:
        if code in NOTICES:
            problem = f"has {code}, a preflight notice, which does not stop a run"
            raise (path / "stop_on").invalid(config.stop_on, problem, ["not_finite"])
        if code not in RULES:
            close = nearest(code, RULES, 1, cutoff=0.0)
            problem = f"has {code!r}, which is not a finding"
            raise (path / "stop_on").invalid(config.stop_on, problem, close)
    if config.stop_on and config.findings is None:
        problem = "has no effect, because findings=null disables all rules"
        raise (path / "stop_on").invalid(config.stop_on, problem, [])
    return config


def _rule_settings(findings: Any, path: ConfigPath) -> dict[str, Any] | None:
    """Validates the settings of the rules, and returns them."""
    if findings is None:
        return None
    known: dict[str, Rule | Notice] = {**RULES, **NOTICES}
    for code, settings in findings.items():
        if code not in known:
            raise (path / code).unknown(settings, known, "a finding")
        own = known[code].settings
        if not isinstance(settings, Mapping):
            raise (path / code).invalid(settings, "must be settings of the rule", own)
        for name, value in settings.items():
            place = path / code / name
            if name not in own:
                raise place.unknown(value, own)
            if name == "severity":
                words = [each.value for each in Severity]
                if value is not False and value not in words:
                    raise place.invalid(value, f"must be one of {', '.join(words)}", own[name])
            elif isinstance(value, bool) or not isinstance(value, int | float) or isnan(value):
                raise place.invalid(value, "must be a number", own[name])
            elif name == "patience" and (value < 1 or not float(value).is_integer()):
                raise place.invalid(value, "must be an integer, at least 1", own[name])
    # YAML reads `off` as false.
    return {
        code: {name: "off" if value is False else value for name, value in settings.items()}
        for code, settings in findings.items()
    }
