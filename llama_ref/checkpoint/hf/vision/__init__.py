"""A vision release in the format of Hugging Face: config, image token, tables to convert."""
