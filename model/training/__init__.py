"""Training: optimizer, schedule, averaging, quantization-aware training, resuming."""
