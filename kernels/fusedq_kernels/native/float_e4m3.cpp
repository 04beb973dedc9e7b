#include "gemm.h"

template fusedq::Kernel fusedq::kernel_of<fusedq::Codes::kFloatE4M3>(bool);
