"""The artifact: quantized tensors, entropy-coded and compressed, in one file."""
