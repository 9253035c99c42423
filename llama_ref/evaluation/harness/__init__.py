"""lm-evaluation-harness (the package lm-eval, extra `eval`) over our model.

adapter.py and tasks.py import it at once, others only when they run.
"""
