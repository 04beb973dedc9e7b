"""Which kernel and tile a problem gets, or why none: plain data, no torch and no Triton."""
