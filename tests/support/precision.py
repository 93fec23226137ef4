"""Precisions, implementations and clipping to train with."""

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

IMPLEMENTATIONS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 1.0},
    "value": {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
}


def amp(init_scale: float = 2.0**10) -> MixedPrecision:
    """Float16 with a loss scale on the CPU, where Lightning would choose bfloat16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=10**6)
    return MixedPrecision("16-mixed", "cpu", scaler)


def precision_flags(precision: str) -> dict[str, Any]:
    return {"plugins": [amp()]} if precision == "16-mixed" else {"precision": precision}
