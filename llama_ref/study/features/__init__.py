"""Sparse dictionaries of a model's activations: autoencoders and transcoders, read and used."""
