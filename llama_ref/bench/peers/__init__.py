"""The programs that `llama-ref bench` measures: this package, and others on the same weights."""
