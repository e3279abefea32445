// The handler of the XLA custom call on the CPU: it runs the CPU kernel on XLA's thread pool.
//
// The step is not lowered to HLO, because as HLO it read and wrote the batch about ten times,
// mostly on one thread, and took 5 to 16 times as long.

#include <functional>
#include <string>
#include <utility>

#include "csrc/tensorflow/cpu_step.h"
#include "csrc/tensorflow/xla_call.h"
#include "csrc/thread_pool.h"

namespace tcl {
namespace {

ffi::Error RunOnCpu(ffi::RemainingArgs args, ffi::RemainingRets rets, StepKind kind,
                    ffi::ThreadPool pool) {
  // XLA has one thread pool, so a retry has no other to use.
  const auto schedule = [&pool](std::function<void()> task, bool retry) {
    if (!retry) pool.Schedule(std::move(task));
  };
  return WithStep(args, rets, kind, [&](auto& step, const auto* alpha, const auto* loss_weight) {
    step.options.alpha = *alpha;
    step.options.loss_weight = *loss_weight;
    const absl::Status status = StepOnCpu(step, MakeParallelFor(schedule, pool.num_threads()));
    if (status.ok()) return ffi::Error::Success();
    const auto code = absl::IsResourceExhausted(status) ? ffi::ErrorCode::kResourceExhausted
                                                        : ffi::ErrorCode::kInvalidArgument;
    return ffi::Error(code, std::string(status.message()));
  });
}

XLA_FFI_DEFINE_HANDLER(kHandler, RunOnCpu, BindStep().Ctx<ffi::ThreadPool>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kCpuTarget, "Host", kHandler);

}  // namespace
}  // namespace tcl
