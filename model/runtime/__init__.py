"""What every program needs around its work: errors, files, logs, processes, CUDA graphs."""
