"""Tuned lenses: fit them to a model, score them, read and write them in the published format."""
