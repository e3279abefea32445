// The handler of the XLA custom call on a GPU: it launches the CUDA kernel on XLA's stream. It
// neither allocates memory nor waits for the device, so XLA can capture it in a CUDA graph (a
// command buffer).
//
// The workspace is a result of the call. XLA's buffer assignment therefore gives each call a
// workspace that no concurrent step uses, also in parallel branches of a CUDA graph. XLA does not
// preserve it between executions, so part of it is cleared before each launch.

#include "csrc/tensorflow/xla_call.h"

#if defined(TCL_HAVE_CUDA)

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "cuda/center_loss_cuda.h"

namespace tcl {
namespace {

CudaWorkspace WorkspaceFor(int64_t batch, int64_t dim, int64_t center_size) {
  CudaWorkspace workspace;
  workspace.batch = batch;
  workspace.dim = dim;
  workspace.center_size = center_size;
  return workspace;
}

ffi::Error RunOnGpu(ffi::RemainingArgs args, ffi::RemainingRets rets, StepKind kind, void* stream) {
  return WithStep(
      args, rets, kind, [&](const auto& step, const auto* alpha, const auto* loss_weight) {
        if (step.batch > kMostCudaSamples) {
          return ffi::Error::InvalidArgument(absl::StrCat("features: expected at most ",
                                                          kMostCudaSamples,
                                                          " samples on a GPU, got ", step.batch));
        }
        CudaWorkspace workspace = WorkspaceFor(step.batch, step.dim, sizeof(*alpha));
        workspace.memory = (*rets.get<ffi::AnyBuffer>(rets.size() - 1))->untyped_data();
        int error = ZeroOnCuda(workspace.memory, CudaWorkspaceClearBytes(workspace), stream);
        if (error == 0) error = CenterLossOnCuda(step, {alpha, loss_weight}, workspace, stream);
        if (error == 0) return ffi::Error::Success();
        return ffi::Error::Internal(absl::StrCat("launching the center loss step: CUDA error ",
                                                 error, ", ", CudaErrorText(error)));
      });
}

#if !defined(TCL_EMULATED_CUDA)
XLA_FFI_DEFINE_HANDLER(kHandler, RunOnGpu, BindStep().Ctx<ffi::PlatformStream<void*>>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGpuTarget, "CUDA", kHandler);
#else
// The tests compile this file for the CPU, where XLA has no stream, with the emulated launchers of
// tests/emulator, which run one launch at a time.
ffi::Error RunEmulated(ffi::RemainingArgs args, ffi::RemainingRets rets, StepKind kind) {
  static absl::Mutex mutex(absl::kConstInit);
  const absl::MutexLock lock(mutex);
  return RunOnGpu(args, rets, kind, nullptr);
}
XLA_FFI_DEFINE_HANDLER(kHandler, RunEmulated, BindStep());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGpuTarget, "Host", kHandler);
#endif

}  // namespace

int64_t XlaWorkspaceBytes(int64_t batch, int64_t dim, int64_t center_size) {
  return CudaWorkspaceBytes(WorkspaceFor(batch, dim, center_size));
}

}  // namespace tcl

#else

int64_t tcl::XlaWorkspaceBytes(int64_t, int64_t, int64_t) { return -1; }

#endif
