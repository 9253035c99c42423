"""Activations of many prompts: collected into a folder, and read back."""
