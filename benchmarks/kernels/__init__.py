"""`strongroom bench kernels`: what the GPU kernels cost, measured on a GPU, derived from machine code without one."""

from benchmarks.kernels.report import main

__all__ = ["main"]
