"""Peers of bench_study.py (worker.py runs one task) and of compare_study.py (oracles.py), in their own environments."""
