"""Hugging Face's conventions: config.json, tensor names, tokenizer.json, chat templates."""
