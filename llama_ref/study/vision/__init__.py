"""Studying models that read images."""
