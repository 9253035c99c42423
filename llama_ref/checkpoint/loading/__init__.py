"""From a folder to a model in memory, with checksums verified at the first load."""
