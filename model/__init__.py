"""The shared package: model, optimizer, quantisation and test-time training.

Import from its modules (`from model.gpt import GPT`); importing them needs torch alone.
"""
