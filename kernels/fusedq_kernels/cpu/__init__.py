"""The kernels of a CPU."""
