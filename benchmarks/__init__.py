"""Throughput comparisons: ``pytest benchmarks`` and ``python -m benchmarks.report``."""
