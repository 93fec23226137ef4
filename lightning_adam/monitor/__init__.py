"""Measure Adam during training and log what was measured."""
