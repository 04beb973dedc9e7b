"""Evidence that the plan is what runs: numbers of kernels and of a profile."""
