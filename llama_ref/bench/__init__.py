"""`llama-ref bench`: how fast a checkpoint runs here, beside others that run the same weights."""
