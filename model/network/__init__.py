"""The network, its adapters, its key/value caches and its checkpoints."""
