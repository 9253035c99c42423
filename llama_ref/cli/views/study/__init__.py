"""What the study commands print: tables of at most 80 columns, or JSON."""
