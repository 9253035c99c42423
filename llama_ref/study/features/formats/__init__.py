"""The public file formats of sparse autoencoders and transcoders, one module for each."""
