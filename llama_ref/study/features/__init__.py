"""Sparse dictionaries of a model's activations: read and use autoencoders and transcoders."""
