"""Metrics, full ranking and the modules for `evaluate`."""
