"""Run lm-evaluation-harness (the package lm-eval, extra `eval`) with our model.

adapter.py and tasks.py import it at module level, the other files only when they need it.
"""
