"""What it costs to look inside Adam: `python -m benchmarks.monitor_cost`."""
