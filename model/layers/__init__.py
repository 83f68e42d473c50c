"""Layers of the model, one technique per file."""
