"""Ablation: what is lost without a part of a model, and which units tell two kinds of texts apart?"""
