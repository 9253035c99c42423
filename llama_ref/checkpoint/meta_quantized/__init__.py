"""Meta's quantized releases: what their files hold, and how it becomes a model's matrices."""
