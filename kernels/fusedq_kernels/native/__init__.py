"""cpu-fused in C++, what it is compiled for, and its library."""
