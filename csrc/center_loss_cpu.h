// The center loss step on the CPU, over raw pointers and a caller's threads.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_

#include <cstdint>
#include <functional>

#include "csrc/center_loss.h"
#include "csrc/row_loops.h"

namespace tcl {

// Calls work(begin, end) over ranges that together are [0, total), on as many threads as it likes
// and in any order; returns when all are done. `bytes` is the memory traffic of one unit.
using Work = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t total, int64_t bytes, const Work& work)>;

// Below this much memory traffic a second thread costs more than it saves.
constexpr int64_t kMinBytesPerThread = int64_t{1} << 19;

// Does the step. Returns -1, or the position of the first label that is neither in [0, C) nor
// ignored; nothing has been written then. The bits of the results depend on neither the number of
// threads nor the instruction set. Scratch memory is O(B + D) per thread, nothing grows with C.
template <typename Feature, typename Label>
int64_t CenterLossOnCpu(const StepArguments<Feature, Label>& step, const ParallelFor& parallel_for,
                        Isa isa);

// The backward pass: gradient[i, :] = upstream[i] * residual[i, :], or upstream[0] for every row
// where `per_sample` is false; rounded to the features' type.
template <typename Feature>
void BackwardOnCpu(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, const ParallelFor& parallel_for, Isa isa);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_
