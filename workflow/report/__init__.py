"""The report: read results, summarise them, draw and render."""
