"""What the commands print: one file per command; those of the study in a folder."""
