"""The public file formats of sparse autoencoders and transcoders, a module each."""
