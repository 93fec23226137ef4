"""What a user hands AdamMonitor → its checked config.

What is wrong is refused under the field's full name in the user's config.

Imports neither torch nor lightning.
"""

from collections.abc import Mapping
from math import isnan
from typing import Any

from lightning_adam._compat.omegaconf import full_key
from lightning_adam.config.errors import nearest, refusal, unknown_field
from lightning_adam.config.forms import values_of
from lightning_adam.config.schema import MonitorConfig, Severity
from lightning_adam.findings import RULES
from lightning_adam.statistics.selection import read_selection


def read_monitor(node: Any, where: str = "adam_monitor") -> MonitorConfig:
    """Checks the monitor's settings.

    Args:
        node: A composed Hydra node, a dict, or a `MonitorConfig`.
        where: The full name of its place, if it is no part of a composed config.

    Raises:
        ConfigError: If a key is unknown, a value is out of range, what the kernel is written in is
            not installed, or a finding that is to end the training is not looked for.

    Example:
        >>> read_monitor({"every_n_steps": 10}).every_n_steps
        10
    """
    where = full_key(node, where)
    config = read_selection(values_of(node, where), where)
    config.findings = _rule_settings(config.findings, where)
    for code in config.stop_on:
        if code not in RULES:
            expected = f"expected findings, but {code} is none"
            (close,) = nearest(code, RULES, 1, cutoff=0.0)
            raise refusal(where, "stop_on", config.stop_on, expected, [close])
    if config.stop_on and config.findings is None:
        expected = "expected no findings, for findings=null looks for none"
        raise refusal(where, "stop_on", config.stop_on, expected, [])
    return config


def _rule_settings(findings: Any, where: str) -> dict[str, Any] | None:
    """What is set of the rules, each setting one that its rule has."""
    if findings is None:
        return None
    for code, settings in findings.items():
        place = f"{where}.findings.{code}"
        if code not in RULES:
            raise unknown_field(f"{where}.findings", code, settings, RULES)
        own = RULES[code].settings
        if not isinstance(settings, Mapping):
            raise refusal(f"{where}.findings", code, settings, "expected settings of the rule", own)
        for name, value in settings.items():
            if name not in own:
                raise unknown_field(place, name, value, own)
            if name == "severity":
                words = [each.value for each in Severity]
                if value is not False and value not in words:
                    expected = f"expected one of {', '.join(words)}"
                    raise refusal(place, name, value, expected, own[name])
            elif isinstance(value, bool) or not isinstance(value, int | float) or isnan(value):
                raise refusal(place, name, value, "expected a number", own[name])
            elif name == "persistence" and (value < 1 or not float(value).is_integer()):
                raise refusal(place, name, value, "expected an integer of at least 1", own[name])
    # YAML reads `off` as false.
    return {
        code: {name: "off" if value is False else value for name, value in settings.items()}
        for code, settings in findings.items()
    }
