"""The contestants of bench_study.py, each in its own environment; worker.py runs one task."""
