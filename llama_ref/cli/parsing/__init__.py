"""Command lines: flags declared once, parsed, explained and completed."""
