// The kernels on NumPy arrays, without TensorFlow: what the op is tested and timed against.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "csrc/center_loss.h"
#include "csrc/center_loss_cpu.h"
#include "csrc/names.h"
#include "csrc/python/modules.h"

namespace py = pybind11;

namespace tcl {
namespace {

constexpr struct {
  const char* name;
  Isa isa;
} kIsas[] = {{"baseline", Isa::kBaseline}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}};

std::vector<std::string> Isas() {
  std::vector<std::string> names;
  for (const auto& known : kIsas) {
    if (Supported(known.isa)) names.emplace_back(known.name);
  }
  return names;
}

Isa ParseIsa(const std::string& name) {
  if (name == "auto") return BestIsa();
  for (const auto& known : kIsas) {
    if (name == known.name && Supported(known.isa)) return known.isa;
  }
  throw py::value_error("isa: expected 'auto' or one of isas(), got '" + name + "'");
}

// Ranges small enough that a slow thread does not keep the others waiting, handed out as threads
// become free.
ParallelFor Threads(int threads) {
  return [threads](int64_t total, int64_t bytes, const Work& work) {
    const int64_t most = total * bytes / kMinBytesPerThread + 1;
    const int used = static_cast<int>(threads < most ? threads : most);
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

void RequireDense(const py::array& array, const char* name) {
  Require((array.flags() & py::array::c_style) != 0,
          std::string(name) + ": expected a C-contiguous array");
}

// An array that begins with a cache line, as TensorFlow's tensors do. NumPy promises 16 bytes.
template <typename T>
py::array_t<T> AlignedArray(int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  py::array_t<T> memory(rows * columns + kLine);
  const uint64_t address = reinterpret_cast<uint64_t>(memory.data());
  T* const first = memory.mutable_data() + (64 - address % 64) % 64 / sizeof(T);
  return py::array_t<T>({rows, columns}, first, memory);
}

template <typename Feature, typename Label>
py::tuple Run(const py::array& features, const py::array& labels, py::array& centers,
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
    Require(weights.ndim() == 1 && weights.shape(0) == step.batch,
            "sample_weight: expected shape [" + std::to_string(step.batch) + "]");
    step.sample_weight = weights.data();
  }
  const bool per_sample = options.reduction == Reduction::kNone;
  py::array_t<Center> loss(per_sample ? std::vector<py::ssize_t>{step.batch}
                                      : std::vector<py::ssize_t>{});
  py::array_t<Center> residual = AlignedArray<Center>(step.batch, step.dim);
  step.loss = loss.mutable_data();
  step.residual = residual.mutable_data();
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = CenterLossOnCpu(step, Threads(threads), isa);
  }
  if (bad >= 0) {
    throw py::value_error("labels[" + std::to_string(bad) +
                          "] = " + std::to_string(step.labels[bad]) + " is outside [0, " +
                          std::to_string(step.classes) + ")");
  }
  return py::make_tuple(loss, residual);
}

template <typename Feature>
py::tuple Dispatch(const py::array& features, const py::array& labels, py::array& centers,
                   double alpha, const std::string& rule, const std::string& reduction,
                   const std::optional<py::array>& sample_weight,
                   std::optional<int64_t> ignore_class, bool update_centers, double loss_weight,
                   int threads, Isa isa) {
  using Center = CenterType<Feature>;
  StepOptions<Center> options;
  Require(ParseRule(rule, &options.rule), "rule: unknown rule '" + rule + "'");
  Require(ParseReduction(reduction, &options.reduction),
          "reduction: unknown reduction '" + reduction + "'");
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
    return Run<Feature, int32_t>(features, labels, centers, options, sample_weight, threads, isa);
  }
  if (!py::isinstance<py::array_t<int64_t>>(labels)) {
    throw py::value_error("labels: expected dtype int32 or int64, got " + TypeName(labels));
  }
  return Run<Feature, int64_t>(features, labels, centers, options, sample_weight, threads, isa);
}

py::tuple CenterLossStep(const py::array& features, const py::array& labels, py::array centers,
                         double alpha, const std::string& rule, const std::string& reduction,
                         const std::optional<py::array>& sample_weight,
                         std::optional<int64_t> ignore_class, bool update_centers,
                         double loss_weight, int threads, const std::string& isa) {
  Require(features.ndim() == 2, "features: expected shape [B, D]");
  Require(labels.ndim() == 1 && labels.shape(0) == features.shape(0),
          "labels: expected shape [" + std::to_string(features.shape(0)) + "]");
  Require(centers.ndim() == 2 && centers.shape(1) == features.shape(1),
          "centers: expected shape [C, " + std::to_string(features.shape(1)) + "]");
  Require(threads >= 1, "threads: expected at least 1, got " + std::to_string(threads));
  RequireDense(features, "features");
  RequireDense(labels, "labels");
  RequireDense(centers, "centers");
  const Isa chosen = ParseIsa(isa);
  // NumPy's own types by their number; the name, which Python puts together, takes longer than a
  // small step.
  const py::dtype type = features.dtype();
#define TCL_DISPATCH(condition, Feature)                                                       \
  if (condition) {                                                                             \
    return Dispatch<Feature>(features, labels, centers, alpha, rule, reduction, sample_weight, \
                             ignore_class, update_centers, loss_weight, threads, chosen);      \
  }
  TCL_DISPATCH(type.num() == py::detail::npy_api::NPY_FLOAT_, float)
  TCL_DISPATCH(type.num() == py::detail::npy_api::NPY_DOUBLE_, double)
  TCL_DISPATCH(type.kind() == 'f' && type.itemsize() == 2, Half)
  TCL_DISPATCH(TypeName(features) == "bfloat16", BFloat16)
  throw py::value_error("features: expected dtype float32, float64, float16 or bfloat16, got " +
                        TypeName(features));
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "The center loss kernels on NumPy arrays, without TensorFlow.";
  module.def("isas", Isas, "The instruction sets that the kernels can use on this machine.");
  module.def("center_loss_step", CenterLossStep, py::arg("features"), py::arg("labels"),
             py::arg("centers"), py::kw_only(), py::arg("alpha") = 0.5, py::arg("rule") = "paper",
             py::arg("reduction") = "mean", py::arg("sample_weight") = py::none(),
             py::arg("ignore_class") = py::none(), py::arg("update_centers") = true,
             py::arg("loss_weight") = 1.0, py::arg("threads") = 1, py::arg("isa") = "auto",
             R"(One step on arrays: (loss, residual); centers move in place.

features [B, D] float32, float64, float16 or bfloat16; labels [B] int32 or int64; centers [C, D]
float64 for float64 features, else float32. residual [B, D] is d(loss)/d(features) before it is
rounded to the features' type, in the centers' type. Raises ValueError, with nothing written.)");
#if defined(TCL_HAVE_CUDA)
  DefineCuda(module);
#endif
}

}  // namespace tcl
