"""The shared package: model, optimizer, quantization and test-time training.

Import from its modules (`from model.network.gpt import GPT`); importing them needs torch and numpy
alone,
but for the Triton kernels in `model.kernels`.
"""
