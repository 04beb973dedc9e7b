"""Ahead-of-time inspection of what the compiler makes of the Triton kernels; needs no GPU."""
