"""Infrastructure without maths: errors, files, logs, progress, processes, CUDA graphs."""
