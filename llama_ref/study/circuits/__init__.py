"""Circuits: which edges between a model's parts carry an answer, and how much of it a few edges carry alone."""
