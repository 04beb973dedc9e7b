// Runs cpu-fused on problems in a file, without PyTorch: for a CPU that is emulated.
#include <cstdio>
#include <vector>

#include "op.cpp"

extern "C" {
// The operator's registration, and the threads of its loops: one.
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t,
                                                TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*,
                                  void (*)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = 1;
  return 0;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc run,
                                  void* context) {
  run(begin, end, context);
  return 0;
}
}

template <typename T>
std::vector<T> read(FILE* file) {
  int64_t bytes = 0;
  if (fread(&bytes, 8, 1, file) != 1) exit(2);
  std::vector<T> values(bytes / sizeof(T));
  if (fread(values.data(), 1, bytes, file) != (size_t)bytes) exit(2);
  return values;
}

// A problem: numbers of the operator; tokens, blocks, n_padded, scale stride, scale width, n, half;
// qweight, scales, x, bias, codebook. Its answer: y.
int main(int, char** arguments) {
  FILE *problems = fopen(arguments[1], "rb"), *answers = fopen(arguments[2], "wb");
  int64_t count = read<int64_t>(problems)[0];
  while (count--) {
    const auto numbers = read<int64_t>(problems), sizes = read<int64_t>(problems);
    const auto words = read<int32_t>(problems), scales = read<int32_t>(problems);
    const auto x = read<uint16_t>(problems), bias = read<uint16_t>(problems);
    const auto codebook = read<double>(problems);
    const fusedq::Described told(numbers, codebook);
    const int64_t tokens = sizes[0], n = sizes[5];
    const bool half = sizes[6];
    fusedq::Weight weight;
    weight.words = words.data(), weight.blocks = sizes[1], weight.n_padded = sizes[2];
    weight.scales = {scales.data(),    sizes[3],      (fusedq::ScaleKind)numbers[8],
                     numbers[9] != 0, (int)sizes[4], (float)numbers[1]};
    weight.groups = {numbers[3], numbers[6], numbers[7], (int)numbers[4]};
    const fusedq::Input in{x.data(), numbers[2], half, nullptr, numbers[2], numbers[5]};
    std::vector<uint16_t> y(tokens * n);
    const fusedq::Output out{y.data(), n, half, told.row_scales(weight), bias.data()};
    fusedq::run(fusedq::kernel_for(told.codes(), half), weight, in, tokens, out, told.table);
    fwrite(y.data(), 2, y.size(), answers);
  }
  fclose(answers);
}
