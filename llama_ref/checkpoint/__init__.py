"""Checkpoints on disk: finding a folder, checking it, reading and writing its weights."""
