"""Directions in the residual stream: extracted, probed for, steered by, stored."""
