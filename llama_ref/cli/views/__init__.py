"""What the commands print: one file per command; those of the study commands are in a folder."""
