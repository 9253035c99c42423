"""The usual questions about a model, one per file."""
