"""The same operations in plain PyTorch, written to be read; tests and benchmarks compare against these."""
