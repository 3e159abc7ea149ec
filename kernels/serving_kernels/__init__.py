"""GPU kernels of the serving path, each with a reference in plain PyTorch; imports nothing of the server."""
