#include "gemm.h"

template fusedq::Kernel fusedq::kernel_of<fusedq::Codes::kInt8>(bool);
