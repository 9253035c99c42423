"""Download Meta's releases with the signed link of its form. Nothing of the loader imports this."""
