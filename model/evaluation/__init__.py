"""Per-token losses of documents, and the scores they add up to."""
