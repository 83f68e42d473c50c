"""Text sources, tokenizer, shard files and the loaders that read them."""
