"""What the commands print: a file for each, and a folder for the study's."""
