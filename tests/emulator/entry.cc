// The C functions that tests/emulated.py calls: the launchers of cuda/, on host memory.

#include <cstdint>

#include "cuda/center_loss_cuda.h"

namespace {

template <typename Feature, typename Label, typename Emulated>
int Step(const Emulated& e) {
  using Center = tcl::CenterType<Feature>;
  tcl::StepArguments<Feature, Label> step;
  step.batch = e.batch;
  step.dim = e.dim;
  step.classes = e.classes;
  step.features = static_cast<const Feature*>(e.features);
  step.labels = static_cast<const Label*>(e.labels);
  step.sample_weight = static_cast<const Center*>(e.sample_weight);
  step.centers = static_cast<Center*>(e.centers);
  step.loss = static_cast<Center*>(e.loss);
  step.residual = static_cast<Center*>(e.residual);
  step.squared_distance = static_cast<Center*>(e.squared_distance);
  step.features_are_residuals = e.features_are_residuals;
  step.options.rule = static_cast<tcl::Rule>(e.rule);
  step.options.reduction = static_cast<tcl::Reduction>(e.reduction);
  step.options.has_ignore_class = e.has_ignore_class;
  step.options.ignore_class = e.ignore_class;
  step.options.update_centers = e.update_centers;
  const Center alpha = static_cast<Center>(e.alpha),
               loss_weight = static_cast<Center>(e.loss_weight);
  tcl::CudaOptions<Center> options;
  if (e.numbers_in_memory) {
    options.alpha = &alpha;
    options.loss_weight = &loss_weight;
  } else {
    step.options.alpha = alpha;
    step.options.loss_weight = loss_weight;
  }
  options.atomic = e.atomic;
  options.clock = e.clock;
  return tcl::CenterLossOnCuda(step, options, e.workspace, nullptr);
}

template <typename Feature>
int Backward(const void* upstream, bool per_sample, const void* residual, void* gradient,
             int64_t batch, int64_t dim) {
  using Center = tcl::CenterType<Feature>;
  return tcl::BackwardOnCuda(static_cast<const Center*>(upstream), per_sample,
                             static_cast<const Center*>(residual), static_cast<Feature*>(gradient),
                             batch, dim, nullptr);
}

}  // namespace

extern "C" {

struct TclEmulatedStep {
  int64_t batch, dim, classes;
  const void *features, *labels, *sample_weight;
  void *centers, *loss, *residual, *squared_distance;
  int64_t ignore_class;
  double alpha, loss_weight;
  tcl::CudaWorkspace workspace;
  uint64_t* clock;
  int32_t feature_type, rule, reduction;
  bool long_labels, features_are_residuals, has_ignore_class, update_centers, numbers_in_memory,
      atomic;
};

int64_t tcl_emulator_workspace_bytes(const tcl::CudaWorkspace* workspace) {
  return tcl::CudaWorkspaceBytes(*workspace);
}

int64_t tcl_emulator_workspace_clear_bytes(const tcl::CudaWorkspace* workspace) {
  return tcl::CudaWorkspaceClearBytes(*workspace);
}

int64_t tcl_emulator_blocks(const tcl::CudaWorkspace* workspace, int64_t batch) {
  return tcl::CudaBlocks(*workspace, batch);
}

// Returns the name of launch constant k and sets its default; null if there is no constant k.
const char* tcl_emulator_tuning(int k, int* value) {
  if (k >= tcl::kCudaTuningFields) return nullptr;
  *value = tcl::CudaTuning().*tcl::kCudaTuning[k].value;
  return tcl::kCudaTuning[k].name;
}

// Returns the name of phase k; null if there is none.
const char* tcl_emulator_phase(int k) {
  return k < tcl::kCudaPhases ? tcl::kCudaPhaseNames[k] : nullptr;
}

int tcl_emulator_step(const TclEmulatedStep* e) {
  switch (e->feature_type) {
    case 0:
      return e->long_labels ? Step<float, int64_t>(*e) : Step<float, int32_t>(*e);
#if !defined(TCL_FLOAT_ONLY)
    case 1:
      return e->long_labels ? Step<double, int64_t>(*e) : Step<double, int32_t>(*e);
    case 2:
      return e->long_labels ? Step<tcl::Half, int64_t>(*e) : Step<tcl::Half, int32_t>(*e);
    case 3:
      return e->long_labels ? Step<tcl::BFloat16, int64_t>(*e) : Step<tcl::BFloat16, int32_t>(*e);
#endif
  }
  return -1;
}

int tcl_emulator_backward(int feature_type, const void* upstream, bool per_sample,
                          const void* residual, void* gradient, int64_t batch, int64_t dim) {
  switch (feature_type) {
    case 0:
      return Backward<float>(upstream, per_sample, residual, gradient, batch, dim);
#if !defined(TCL_FLOAT_ONLY)
    case 1:
      return Backward<double>(upstream, per_sample, residual, gradient, batch, dim);
    case 2:
      return Backward<tcl::Half>(upstream, per_sample, residual, gradient, batch, dim);
    case 3:
      return Backward<tcl::BFloat16>(upstream, per_sample, residual, gradient, batch, dim);
#endif
  }
  return -1;
}

const char* tcl_emulator_error(int error) { return tcl::CudaErrorText(error); }
}
