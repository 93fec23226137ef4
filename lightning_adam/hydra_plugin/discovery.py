"""Installed as `hydra_plugins/lightning_adam.py`, the namespace package that Hydra scans."""

from lightning_adam.hydra_plugin import LightningAdamSearchPath

__all__ = ["LightningAdamSearchPath"]
