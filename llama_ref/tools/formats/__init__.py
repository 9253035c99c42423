"""The formats in which models write calls, one per file, and their parsers."""
