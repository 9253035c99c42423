"""lm-evaluation-harness (the package lm-eval, extra `eval`) over our model. Only adapter.py and tasks.py import it."""
