"""Explain what is unusual about a folder, and what to do about it."""
