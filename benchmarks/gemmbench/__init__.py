"""Shared parts of the kernel benchmarks; the commands are the scripts one folder up."""
