"""Speed and size, as commands that print a table (`python -m benchmarks.<name>`)."""
