"""Checking a folder: checksums, structure, and what is told of it."""
