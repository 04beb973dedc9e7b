#include "gemm.h"

// With int4.cpp's where they are decoded alike
#if !defined(__AVX512F__)
template fusedq::Kernel fusedq::kernel_of<fusedq::Codes::kFloatE2M1>(bool);
#endif
