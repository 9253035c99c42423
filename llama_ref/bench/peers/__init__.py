"""What `llama-ref bench` measures: this package, and other programs on the same weights."""
