"""Check a checkpoint folder: checksums, structure and the report."""
