"""The report: an HTML page about one text."""
