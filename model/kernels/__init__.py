"""Accelerated operations, their references, and the one place that chooses between them."""
