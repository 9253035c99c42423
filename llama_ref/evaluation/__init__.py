"""How well a model predicts: perplexity of texts, and the tasks of lm-evaluation-harness."""
