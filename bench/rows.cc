// Two lower bounds for the kernel, which the benchmark compiles for its machine: the hand-written row
// loop, which computes residuals and moves centers without grouping, loss and checks, and a copy.
// Both use OpenMP, as the Python binding of the kernel does.

#include <cstdint>
#include <cstring>

// The caller has grouped the labels: group g of class label[g] holds the samples
// order[begin[g], begin[g + 1]). Reads features [B, D], reads and writes the row of each class in
// centers once, and writes residual [B, D].
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
