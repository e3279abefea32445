// The center loss step and its backward pass on the CPU. The functions take raw pointers and a
// ParallelFor through which the caller supplies its threads; they include no framework.

#ifndef TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_
#define TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_

#include <cstdint>
#include <functional>

#include "csrc/center_loss.h"
#include "csrc/isa.h"

namespace tcl {

// Calls work(begin, end) for disjoint ranges that cover [0, total), on any number of threads and in
// any order, and returns when all calls have returned. `bytes` is the memory traffic per index.
using Work = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t total, int64_t bytes, const Work& work)>;

// With less memory traffic than this, a second thread costs more time than it saves.
constexpr int64_t kMinBytesPerThread = int64_t{1} << 19;

// What CenterLossOnCpu returns where it is not the position of a label.
constexpr int64_t kStepDone = -1;
constexpr int64_t kStepOutOfMemory = -2;  // there is no memory for the scratch arrays

// Runs one step. Returns kStepDone; or kStepOutOfMemory, or the position of the first label that is
// neither in [0, C) nor ignored: then nothing is written. The bits of the results depend neither on
// the number of threads nor on the instruction set. Scratch memory is O(B + D) per thread and
// independent of C.
template <typename Feature, typename Label>
int64_t CenterLossOnCpu(const StepArguments<Feature, Label>& step, const ParallelFor& parallel_for,
                        Isa isa);

// Runs the backward pass: gradient[i, :] = upstream[i] * residual[i, :], rounded to the features'
// type. `residual` holds the scaled residuals of the step. If `per_sample` is false, upstream[0] is
// used for every row.
template <typename Feature>
void BackwardOnCpu(const CenterType<Feature>* upstream, bool per_sample,
                   const CenterType<Feature>* residual, Feature* gradient, int64_t batch,
                   int64_t dim, const ParallelFor& parallel_for, Isa isa);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_CENTER_LOSS_CPU_H_
