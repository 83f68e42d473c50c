"""GPTQ, and how many bits each tensor gets."""
