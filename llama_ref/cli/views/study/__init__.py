"""What the study commands print: tables that 80 columns hold, or JSON; a file for each command, and shared.py."""
