"""The whole of params.yaml: schema and presets."""
