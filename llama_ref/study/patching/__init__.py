"""Activation patching: which activations of a model carry the difference between two texts?"""
