"""Quantized weights in 8 or 4 bits: schemes, rounding, and the modules that compute with them."""
