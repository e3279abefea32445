// The Python module _kernels: the CPU kernel on NumPy arrays. The tests and benchmarks use it to
// run the kernel without an op around it. This file knows pybind11 and OpenMP; it does not know
// TensorFlow, and it computes nothing itself.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "csrc/center_loss.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/isa.h"
#include "csrc/names.h"
#include "csrc/python/modules.h"

namespace py = pybind11;

namespace tcl {
namespace {

// A ParallelFor on OpenMP's threads. There are eight ranges per thread and dynamic scheduling, so
// that a delayed thread does not delay the others.
ParallelFor OpenMpParallelFor(int threads) {
  return [threads](int64_t total, int64_t bytes, const Work& work) {
    const int64_t useful = total * bytes / kMinBytesPerThread + 1;
    const int used = static_cast<int>(threads < useful ? threads : useful);
    if (used <= 1) {
      work(0, total);
      return;
    }
    const int64_t ranges = int64_t{8} * used;
#pragma omp parallel for schedule(dynamic) num_threads(used)
    for (int64_t r = 0; r < ranges; ++r) {
      const int64_t begin = total * r / ranges, end = total * (r + 1) / ranges;
      if (begin < end) work(begin, end);
    }
  };
}

void Require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

std::string TypeName(const py::array& array) {
  return py::str(py::dtype(array.dtype()).attr("name"));
}

std::string ShapeText(const py::array& array) { return py::str(array.attr("shape")); }

void RequireContiguous(const py::array& array, const char* name) {
  if ((array.flags() & py::array::c_style) != 0) return;
  throw py::value_error(std::string(name) + ": expected a C-contiguous array, got strides " +
                        std::string(py::str(array.attr("strides"))) + " for shape " +
                        ShapeText(array));
}

// An array aligned to a cache line, as TensorFlow's tensors are; NumPy aligns to 16 bytes.
template <typename T>
py::array_t<T> AlignedArray(int64_t rows, int64_t columns) {
  constexpr size_t kCacheLine = 64;
  const size_t bytes = static_cast<size_t>(rows * columns) * sizeof(T);
  py::array_t<T> memory(rows * columns + static_cast<int64_t>(kCacheLine / sizeof(T)));
  void* first = memory.mutable_data();
  size_t space = bytes + kCacheLine;
  std::align(kCacheLine, bytes, first, space);
  return py::array_t<T>({rows, columns}, static_cast<T*>(first), memory);
}

template <typename Feature, typename Label>
py::tuple RunTyped(const py::array& features, const py::array& labels, py::array& centers,
                   const StepOptions<CenterType<Feature>>& options,
                   const std::optional<py::array>& sample_weight, int threads, Isa isa) {
  using Center = CenterType<Feature>;
  StepArguments<Feature, Label> step;
  step.options = options;
  step.batch = features.shape(0);
  step.dim = features.shape(1);
  step.classes = centers.shape(0);
  step.features = static_cast<const Feature*>(features.data());
  step.labels = static_cast<const Label*>(labels.data());
  step.centers = static_cast<Center*>(centers.mutable_data());
  py::array_t<Center> weights;
  if (sample_weight.has_value()) {
    weights = py::array_t<Center, py::array::c_style | py::array::forcecast>(*sample_weight);
    if (weights.ndim() != 1 || weights.shape(0) != step.batch) {
      throw py::value_error("sample_weight: expected shape [" + std::to_string(step.batch) +
                            "], got " + ShapeText(weights));
    }
    step.sample_weight = weights.data();
  }
  const bool per_sample = options.reduction == Reduction::kNone;
  py::array_t<Center> loss(per_sample ? std::vector<py::ssize_t>{step.batch}
                                      : std::vector<py::ssize_t>{});
  py::array_t<Center> residual = AlignedArray<Center>(step.batch, step.dim);
  step.loss = loss.mutable_data();
  step.residual = residual.mutable_data();
  int64_t invalid;
  {
    py::gil_scoped_release release;
    invalid = CenterLossOnCpu(step, OpenMpParallelFor(threads), isa);
  }
  if (invalid == kStepOutOfMemory) throw std::bad_alloc();
  if (invalid >= 0) {
    throw py::value_error("labels[" + std::to_string(invalid) +
                          "] = " + std::to_string(step.labels[invalid]) + " is outside [0, " +
                          std::to_string(step.classes) + ")");
  }
  return py::make_tuple(loss, residual);
}

template <typename Feature>
py::tuple RunFeatures(const py::array& features, const py::array& labels, py::array& centers,
                      double alpha, const std::string& rule, const std::string& reduction,
                      const std::optional<py::array>& sample_weight,
                      std::optional<int64_t> ignore_class, bool update_centers, double loss_weight,
                      int threads, Isa isa) {
  using Center = CenterType<Feature>;
  StepOptions<Center> options;
  if (!ParseRule(rule, &options.rule)) throw py::value_error(UnknownRule(rule));
  if (!ParseReduction(reduction, &options.reduction)) {
    throw py::value_error(UnknownReduction(reduction));
  }
  Require(std::isfinite(alpha) && alpha >= 0,
          "alpha: expected a finite number >= 0, got " + std::to_string(alpha));
  options.has_ignore_class = ignore_class.has_value();
  options.ignore_class = ignore_class.value_or(0);
  options.alpha = static_cast<Center>(alpha);
  options.loss_weight = static_cast<Center>(loss_weight);
  options.update_centers = update_centers;
  if (!py::isinstance<py::array_t<Center>>(centers)) {
    throw py::value_error("centers: expected dtype " +
                          std::string(py::str(py::dtype::of<Center>())) + " for " +
                          TypeName(features) + " features, got " + TypeName(centers));
  }
  if (py::isinstance<py::array_t<int32_t>>(labels)) {
    return RunTyped<Feature, int32_t>(features, labels, centers, options, sample_weight, threads,
                                      isa);
  }
  if (!py::isinstance<py::array_t<int64_t>>(labels)) {
    throw py::value_error("labels: expected dtype int32 or int64, got " + TypeName(labels));
  }
  return RunTyped<Feature, int64_t>(features, labels, centers, options, sample_weight, threads,
                                    isa);
}

py::tuple CenterLossStep(const py::array& features, const py::array& labels, py::array centers,
                         double alpha, const std::string& rule, const std::string& reduction,
                         const std::optional<py::array>& sample_weight,
                         std::optional<int64_t> ignore_class, bool update_centers,
                         double loss_weight, int threads, const std::string& isa) {
  if (features.ndim() != 2) {
    throw py::value_error("features: expected shape [B, D], got " + ShapeText(features));
  }
  if (labels.ndim() != 1 || labels.shape(0) != features.shape(0)) {
    throw py::value_error("labels: expected shape [" + std::to_string(features.shape(0)) +
                          "], got " + ShapeText(labels));
  }
  if (centers.ndim() != 2 || centers.shape(1) != features.shape(1)) {
    throw py::value_error("centers: expected shape [C, " + std::to_string(features.shape(1)) +
                          "], got " + ShapeText(centers));
  }
  Require(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
  RequireContiguous(features, "features");
  RequireContiguous(labels, "labels");
  RequireContiguous(centers, "centers");
  Isa chosen;
  Require(ParseIsa(isa, &chosen), "isa: expected 'auto' or one of isas(), got '" + isa + "'");
  // Types are compared by number where NumPy has one: dtype.name is computed in Python, which takes
  // longer than a small step.
  const py::dtype type = features.dtype();
#define TCL_RUN(condition, Feature)                                                               \
  if (condition) {                                                                                \
    return RunFeatures<Feature>(features, labels, centers, alpha, rule, reduction, sample_weight, \
                                ignore_class, update_centers, loss_weight, threads, chosen);      \
  }
  TCL_RUN(type.num() == py::detail::npy_api::NPY_FLOAT_, float)
  TCL_RUN(type.num() == py::detail::npy_api::NPY_DOUBLE_, double)
  TCL_RUN(type.kind() == 'f' && type.itemsize() == 2, Half)
  TCL_RUN(TypeName(features) == "bfloat16", BFloat16)
  throw py::value_error("features: expected dtype float32, float64, float16 or bfloat16, got " +
                        TypeName(features));
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "The center loss kernels on NumPy arrays, without TensorFlow.";
  module.def("isas", SupportedIsaNames,
             "The instruction sets that the kernels can use on this machine.");
  module.def("center_loss_step", CenterLossStep, py::arg("features"), py::arg("labels"),
             py::arg("centers"), py::kw_only(), py::arg("alpha") = 0.5, py::arg("rule") = "paper",
             py::arg("reduction") = "mean", py::arg("sample_weight") = py::none(),
             py::arg("ignore_class") = py::none(), py::arg("update_centers") = true,
             py::arg("loss_weight") = 1.0, py::arg("threads") = 1, py::arg("isa") = "auto",
             R"(One step on arrays: (loss, residual); centers move in place.

features [B, D] float32, float64, float16 or bfloat16; labels [B] int32 or int64; centers [C, D]
float64 for float64 features, else float32. residual [B, D] is d(loss)/d(features) in the centers'
type, not yet rounded to the features' type. Raises ValueError, and then nothing is written.)");
#if defined(TCL_HAVE_CUDA)
  DefineCuda(module);
#endif
}

}  // namespace tcl
