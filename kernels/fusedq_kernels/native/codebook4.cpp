#include "gemm.h"

template fusedq::Kernel fusedq::kernel_of<fusedq::Codes::kCodebook4>(bool);
