"""Decoding: the generation loop, streamed text, speculative decoding."""
