// Two lower bounds for the time of the kernel, which the benchmark compiles for its machine: a
// hand-written loop that moves the rows and leaves out all that makes a usable op (sorting the
// labels, loss, checks), and a copy of the same number of bytes. Both use OpenMP, as does the
// Python binding of the kernel. This file shares no code with csrc/.

#include <cstdint>
#include <cstring>

// The labels are sorted into segments beforehand: segment s has the label label[s] and the samples
// positions[begin[s], begin[s + 1]). Reads features [B, D], reads and writes the center of each
// segment once, and writes residual [B, D].
extern "C" void MoveRows(const float* features, const int64_t* label, const int64_t* begin,
                         const int64_t* positions, int64_t segments, int64_t dim, float alpha,
                         float* centers, float* residual, int threads) {
#pragma omp parallel for schedule(dynamic, segments / (8 * threads) + 1) num_threads(threads)
  for (int64_t s = 0; s < segments; ++s) {
    float* const center = centers + label[s] * dim;
    const float scale = alpha / static_cast<float>(1 + begin[s + 1] - begin[s]);
    for (int64_t k = begin[s]; k < begin[s + 1]; ++k) {
      const float* const x = features + positions[k] * dim;
      float* const d = residual + positions[k] * dim;
      for (int64_t j = 0; j < dim; ++j) d[j] = x[j] - center[j];
    }
    for (int64_t k = begin[s]; k < begin[s + 1]; ++k) {
      const float* const d = residual + positions[k] * dim;
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
