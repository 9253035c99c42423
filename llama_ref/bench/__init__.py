"""`llama-ref bench`: measure a checkpoint, alone or against other programs."""
