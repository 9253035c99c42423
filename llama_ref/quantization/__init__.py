"""Weights in eight or four bits: schemes, rounding, and the modules that compute with them."""
