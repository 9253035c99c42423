"""Download Meta's releases with the signed link from its request form.

The checkpoint loader does not import this.
"""
