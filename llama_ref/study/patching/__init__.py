"""Activation patching: where in a model are two texts told apart?"""
