"""Typed configs: what can be set, its default and its range."""
