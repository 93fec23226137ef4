"""Typed configs: the settings with their defaults and ranges."""
