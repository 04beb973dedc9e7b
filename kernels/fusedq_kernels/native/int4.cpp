#include "gemm.h"

namespace fusedq {

template Kernel kernel_of<Codes::kInt4>(bool);
#if defined(__AVX512F__)
template Kernel kernel_of<Codes::kFloatE2M1>(bool);
#endif

}  // namespace fusedq
