"""How tokens are made: the generation loop, text as it streams, speculative decoding."""
