"""Tuned lenses: fitted to a model, scored, read and written in the published form."""
