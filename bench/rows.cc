// What the kernel is held against, written by hand and compiled by the benchmark for its machine:
// the movement of the rows without everything that makes it a usable op (grouping, loss, checks),
// and a copy. Both use OpenMP, as the bare kernel's Python binding does.

#include <cstdint>
#include <cstring>

// Labels come grouped: group g, of class label[g], has the samples order[begin[g], begin[g + 1]).
// Reads features [B, D], reads and writes each class's row of centers once, writes residual [B, D].
extern "C" void MoveRows(const float* features, const int64_t* label, const int64_t* begin,
                         const int64_t* order, int64_t groups, int64_t dim, float alpha,
                         float* centers, float* residual, int threads) {
#pragma omp parallel for schedule(dynamic, groups / (8 * threads) + 1) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    float* const center = centers + label[g] * dim;
    const float scale = alpha / static_cast<float>(1 + begin[g + 1] - begin[g]);
    for (int64_t k = begin[g]; k < begin[g + 1]; ++k) {
      const float* const x = features + order[k] * dim;
      float* const d = residual + order[k] * dim;
      for (int64_t j = 0; j < dim; ++j) d[j] = x[j] - center[j];
    }
    for (int64_t k = begin[g]; k < begin[g + 1]; ++k) {
      const float* const d = residual + order[k] * dim;
      for (int64_t j = 0; j < dim; ++j) center[j] += scale * d[j];
    }
  }
}

extern "C" void Copy(const char* from, char* to, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = bytes * t / threads, end = bytes * (t + 1) / threads;
    std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin));
  }
}
