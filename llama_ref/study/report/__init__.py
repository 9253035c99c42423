"""The report: one HTML file about one text."""
