"""The whole of params.yaml: composition, checks and presets."""
