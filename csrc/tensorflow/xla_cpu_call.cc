// XLA calls the CPU kernel: its threads become a parallel-for.
//
// Why not HLO on the CPU: as HLO the same step read and wrote the batch some ten times, most of it
// on one thread, and took 5 to 16 times as long.

#include <functional>
#include <string>
#include <utility>

#include "csrc/thread_pool.h"
#include "csrc/tensorflow/cpu_step.h"
#include "csrc/tensorflow/xla_call.h"

namespace tcl {
namespace {

ffi::Error RunOnCpu(ffi::RemainingArgs args, ffi::RemainingRets rets, StepKind kind,
                    ffi::ThreadPool pool) {
  const auto schedule = [&pool](std::function<void()> task, bool again) {
    if (!again) pool.Schedule(std::move(task));
  };
  return WithStep(args, rets, kind, [&](auto& step, const auto* alpha, const auto* loss_weight) {
    step.options.alpha = *alpha;
    step.options.loss_weight = *loss_weight;
    const absl::Status status = StepOnCpu(step, MakeParallelFor(schedule, pool.num_threads()));
    return status.ok() ? ffi::Error::Success()
                       : ffi::Error::InvalidArgument(std::string(status.message()));
  });
}

XLA_FFI_DEFINE_HANDLER(kHandler, RunOnCpu, BindStep().Ctx<ffi::ThreadPool>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kCpuTarget, "Host", kHandler);

}  // namespace
}  // namespace tcl
