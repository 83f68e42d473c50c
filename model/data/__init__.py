"""Text to packed tokens: sources, tokenizer, shards, loader, packing."""
