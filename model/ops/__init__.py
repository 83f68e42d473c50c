"""The only package that chooses accelerators; every operation has a plain reference."""
