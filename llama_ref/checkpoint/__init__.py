"""All that touches bytes on disk: finding a folder, checking it, reading its weights."""
