// The CUDA part of the Python module _kernels: the CUDA kernels on arrays of any library with
// DLPack or __cuda_array_interface__ (CuPy, PyTorch, Numba, JAX). The tests and benchmarks use it
// to run the kernels without an op around them. This file knows pybind11 and the launchers of
// cuda/center_loss_cuda.h; it knows neither TensorFlow nor the CUDA runtime.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "csrc/names.h"
#include "csrc/python/modules.h"
#include "cuda/center_loss_cuda.h"

namespace py = pybind11;

namespace tcl {
namespace {

// The fields of DLPack's C structures that are read here (dlpack.h, version 0.8). Declared here,
// because neither pybind11 nor NumPy installs dlpack.h.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
constexpr int32_t kDLCuda = 2, kDLCudaManaged = 13;

void Require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

void Check(int error, const char* what) {
  if (error != 0) {
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error) + ", " +
                             CudaErrorText(error));
  }
}

// A C-contiguous array in device memory, borrowed from its owner for one call.
struct CudaArray {
  void* data = nullptr;
  std::vector<int64_t> shape;
  std::string dtype;  // as NumPy names it, or bfloat16

  std::string ShapeText() const { return py::str(py::cast(shape)); }
};

std::string DtypeOf(const DLTensor& tensor) {
  static constexpr const char* kNames[] = {"int", "uint", "float", nullptr, "bfloat"};
  if (tensor.type_lanes != 1 || tensor.type_code >= 5 || tensor.type_code == 3) return "unknown";
  return kNames[tensor.type_code] + std::to_string(tensor.type_bits);
}

CudaArray FromDLPack(const py::object& object, const char* name) {
  const std::string expected =
      std::string(name) + ": expected an array in the memory of a CUDA device";
  py::capsule capsule;
  try {
    // stream = -1 requests no synchronisation: the caller passes the stream of the launch.
    capsule = object.attr("__dlpack__")(py::arg("stream") = -1);
  } catch (const py::error_already_set& error) {  // NumPy refuses any stream
    throw py::value_error(expected + " (" + std::string(py::str(error.value())) + ")");
  }
  const auto* tensor =
      static_cast<const DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  Require(tensor->device_type == kDLCuda || tensor->device_type == kDLCudaManaged, expected);
  CudaArray array;
  array.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  array.shape.assign(tensor->shape, tensor->shape + tensor->ndim);
  array.dtype = DtypeOf(*tensor);
  int64_t stride = 1;
  for (int k = tensor->ndim - 1; k >= 0; --k) {
    Require(tensor->strides == nullptr || tensor->shape[k] == 1 || tensor->strides[k] == stride,
            std::string(name) + ": expected a C-contiguous array, got stride " +
                std::to_string(tensor->strides == nullptr ? stride : tensor->strides[k]) +
                " in dimension " + std::to_string(k) + " of shape " + array.ShapeText());
    stride *= tensor->shape[k];
  }
  return array;
}

CudaArray FromInterface(const py::object& object, const char* name) {
  const py::dict interface = object.attr("__cuda_array_interface__");
  CudaArray array;
  array.data = reinterpret_cast<void*>(interface["data"].cast<py::tuple>()[0].cast<uintptr_t>());
  array.shape = interface["shape"].cast<std::vector<int64_t>>();
  const std::string type = interface["typestr"].cast<std::string>();
  Require(type.size() > 2 && type[0] != '>',
          std::string(name) + ": expected a dtype in native byte order, got " + type);
  const std::string kind = type[1] == 'f' ? "float" : type[1] == 'i' ? "int" : "unknown";
  array.dtype = kind + std::to_string(8 * std::stoi(type.substr(2)));
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    throw py::value_error(std::string(name) + ": expected a C-contiguous array, got strides " +
                          std::string(py::str(interface["strides"])) + " for shape " +
                          array.ShapeText());
  }
  return array;
}

CudaArray Borrow(const py::object& object, const char* name) {
  if (py::hasattr(object, "__dlpack__")) return FromDLPack(object, name);
  Require(py::hasattr(object, "__cuda_array_interface__"),
          std::string(name) + ": expected an array with DLPack or __cuda_array_interface__, got " +
              std::string(py::str(py::type::of(object).attr("__name__"))));
  return FromInterface(object, name);
}

void RequireArray(const CudaArray& array, const char* name, const std::string& dtype,
                  const std::vector<int64_t>& shape) {
  Require(array.dtype == dtype,
          std::string(name) + ": expected dtype " + dtype + ", got " + array.dtype);
  Require(array.shape == shape, std::string(name) + ": expected shape " +
                                    std::string(py::str(py::cast(shape))) + ", got " +
                                    array.ShapeText());
}

// A scalar argument: a number, or an array of shape [] on the device.
using ScalarArgument = std::variant<double, py::object>;

// Device memory as bytes, for any library that reads __cuda_array_interface__.
struct CudaBytes {
  void* memory;
  int64_t size;

  py::dict Interface() const {
    py::dict interface;
    interface["shape"] = py::make_tuple(size);
    interface["typestr"] = "|u1";
    interface["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(memory), false);
    interface["version"] = 3;
    return interface;
  }
};

// Runs steps of batches up to [batch, dim], one after another on one stream, with one workspace.
class CudaStep {
 public:
  CudaStep(int64_t batch, int64_t dim, const std::string& dtype, bool atomic,
           const std::map<std::string, int>& tuning, bool phases) {
    Require(batch >= 0 && dim >= 1, "batch, dim: expected at least 0 and 1, got " +
                                        std::to_string(batch) + ", " + std::to_string(dim));
    Require(batch <= kMostCudaSamples, "batch: expected at most " +
                                           std::to_string(kMostCudaSamples) + ", got " +
                                           std::to_string(batch));
    Require(dtype == "float32" || dtype == "float64",
            "dtype: expected float32 or float64, the centers' type, got " + dtype);
    dtype_ = dtype;
    workspace_.batch = batch;
    workspace_.dim = dim;
    workspace_.center_size = dtype == "float32" ? 4 : 8;
    workspace_.atomic = atomic;
    for (const auto& [name, value] : tuning) {
      const auto* const field =
          std::find_if(kCudaTuning, kCudaTuning + kCudaTuningFields,
                       [&name = name](const CudaTuningField& one) { return one.name == name; });
      Require(field != kCudaTuning + kCudaTuningFields,
              "tuning: unknown constant '" + name + "', expected a name in cuda_tuning()");
      Require(value >= field->least && value <= field->largest,
              "tuning: expected " + name + " from " + std::to_string(field->least) + " to " +
                  std::to_string(field->largest) + ", got " + std::to_string(value));
      workspace_.tuning.*field->value = value;
    }
    const int64_t bytes = CudaWorkspaceBytes(workspace_);
    Check(AllocateOnCuda(&workspace_.memory, bytes), "allocating the workspace");
    Check(ZeroOnCuda(workspace_.memory, bytes, nullptr), "clearing the workspace");
    if (phases) {
      blocks_ = CudaBlocks(workspace_, batch);
      Check(blocks_ < 0 ? static_cast<int>(-blocks_) : 0, "finding the number of blocks");
      void* clock;
      Check(AllocateOnCuda(&clock, ClockBytes()), "allocating the clock");
      clock_ = static_cast<uint64_t*>(clock);
      Check(ZeroOnCuda(clock, ClockBytes(), nullptr), "clearing the clock");
    }
    Check(WaitForCuda(), "clearing the workspace");
  }
  ~CudaStep() {
    FreeOnCuda(clock_);
    FreeOnCuda(workspace_.memory);
  }
  CudaStep(const CudaStep&) = delete;
  CudaStep& operator=(const CudaStep&) = delete;

  // For each point of a launch: (point, time of the first block, time of the last block), in
  // microseconds after the first block began.
  std::vector<std::tuple<std::string, double, double>> Phases() const {
    Require(clock_ != nullptr, "phases: expected a step that was made with phases=True");
    std::vector<uint64_t> times(static_cast<size_t>(blocks_) * kCudaPhases);
    Check(WaitForCuda(), "waiting for the step");
    Check(CopyFromCuda(times.data(), clock_, ClockBytes()), "copying the clock");
    uint64_t begun = ~uint64_t{0};
    for (int64_t b = 0; b < blocks_; ++b) begun = std::min(begun, times[b * kCudaPhases]);
    std::vector<std::tuple<std::string, double, double>> phases;
    for (int k = 0; k < kCudaPhases; ++k) {
      uint64_t first = ~uint64_t{0}, last = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        const uint64_t time = times[b * kCudaPhases + k];
        if (time == 0) continue;
        first = std::min(first, time);
        last = std::max(last, time);
      }
      if (last == 0) continue;
      phases.emplace_back(kCudaPhaseNames[k], 1e-3 * static_cast<double>(first - begun),
                          1e-3 * static_cast<double>(last - begun));
    }
    return phases;
  }

  CudaBytes Workspace() const { return {workspace_.memory, CudaWorkspaceBytes(workspace_)}; }

  void Run(const py::object& features, const py::object& labels, const py::object& centers,
           const py::object& loss, const py::object& residual, const py::object& squared_distance,
           const ScalarArgument& alpha, const std::string& rule, const std::string& reduction,
           const py::object& sample_weight, std::optional<int64_t> ignore_class,
           bool update_centers, const ScalarArgument& loss_weight, bool features_are_residuals,
           uintptr_t stream) {
    const std::string type = Borrow(features, "features").dtype;
    const auto run = [&](auto feature) {
      using Feature = decltype(feature);
      const CudaArray y = Borrow(labels, "labels");
      const auto run_labels = [&](auto label) {
        RunTyped<Feature, decltype(label)>(features, y, centers, loss, residual, squared_distance,
                                           alpha, rule, reduction, sample_weight, ignore_class,
                                           update_centers, loss_weight, features_are_residuals,
                                           stream);
      };
      if (y.dtype == "int32") return run_labels(int32_t{});
      Require(y.dtype == "int64", "labels: expected dtype int32 or int64, got " + y.dtype);
      run_labels(int64_t{});
    };
    if (type == "float32") return run(float{});
    if (type == "float64") return run(double{});
    if (type == "float16") return run(Half{});
    Require(type == "bfloat16",
            "features: expected dtype float32, float64, float16 or bfloat16, got " + type);
    run(BFloat16{});
  }

 private:
  template <typename Feature, typename Label>
  void RunTyped(const py::object& features, const CudaArray& y, const py::object& centers,
                const py::object& loss, const py::object& residual,
                const py::object& squared_distance, const ScalarArgument& alpha,
                const std::string& rule, const std::string& reduction,
                const py::object& sample_weight, std::optional<int64_t> ignore_class,
                bool update_centers, const ScalarArgument& loss_weight, bool features_are_residuals,
                uintptr_t stream) {
    using Center = CenterType<Feature>;
    const CudaArray x = Borrow(features, "features"), c = Borrow(centers, "centers");
    Require(x.shape.size() == 2, "features: expected shape [B, D], got " + x.ShapeText());
    const int64_t batch = x.shape[0], dim = x.shape[1];
    Require(batch <= workspace_.batch && dim <= workspace_.dim,
            "features: expected at most shape [" + std::to_string(workspace_.batch) + ", " +
                std::to_string(workspace_.dim) + "], got " + x.ShapeText());
    const std::string center_dtype = sizeof(Center) == 4 ? "float32" : "float64";
    Require(center_dtype == dtype_, "features: " + x.dtype + " needs a CudaStep of dtype " +
                                        center_dtype + ", this one is of " + dtype_);
    Require(c.shape.size() == 2, "centers: expected shape [C, D], got " + c.ShapeText());
    RequireArray(c, "centers", center_dtype, {c.shape[0], dim});
    RequireArray(y, "labels", y.dtype, {batch});

    StepArguments<Feature, Label> step;
    step.batch = batch;
    step.dim = dim;
    step.classes = c.shape[0];
    step.features = static_cast<const Feature*>(x.data);
    step.labels = static_cast<const Label*>(y.data);
    step.centers = static_cast<Center*>(c.data);
    step.features_are_residuals = features_are_residuals;
    if (!ParseRule(rule, &step.options.rule)) throw py::value_error(UnknownRule(rule));
    if (!ParseReduction(reduction, &step.options.reduction)) {
      throw py::value_error(UnknownReduction(reduction));
    }
    step.options.has_ignore_class = ignore_class.has_value();
    step.options.ignore_class = ignore_class.value_or(0);
    step.options.update_centers = update_centers;
    const auto optional = [&](const py::object& object, const char* name,
                              const std::vector<int64_t>& shape) -> Center* {
      if (object.is_none()) return nullptr;
      const CudaArray array = Borrow(object, name);
      RequireArray(array, name, center_dtype, shape);
      return static_cast<Center*>(array.data);
    };
    const bool per_sample = step.options.reduction == Reduction::kNone;
    step.loss =
        optional(loss, "loss", per_sample ? std::vector<int64_t>{batch} : std::vector<int64_t>{});
    step.residual = optional(residual, "residual", {batch, dim});
    step.squared_distance = optional(squared_distance, "squared_distance", {batch});
    step.sample_weight = optional(sample_weight, "sample_weight", {batch});

    CudaOptions<Center> options;
    options.atomic = workspace_.atomic;
    // A smaller batch may be launched in the scanned form, whose blocks are smaller and more, and
    // would write past the end of the clock.
    options.clock = batch == workspace_.batch ? clock_ : nullptr;
    if (const double* number = std::get_if<double>(&alpha)) {
      Require(std::isfinite(*number) && *number >= 0,
              "alpha: expected a finite number >= 0, got " + std::to_string(*number));
      step.options.alpha = static_cast<Center>(*number);
    } else {
      options.alpha = optional(std::get<py::object>(alpha), "alpha", {});
    }
    if (const double* number = std::get_if<double>(&loss_weight)) {
      step.options.loss_weight = static_cast<Center>(*number);
    } else {
      options.loss_weight = optional(std::get<py::object>(loss_weight), "loss_weight", {});
    }
    Check(CenterLossOnCuda(step, options, workspace_, reinterpret_cast<void*>(stream)),
          "launching the center loss step");
  }

  int64_t ClockBytes() const {
    return blocks_ * kCudaPhases * static_cast<int64_t>(sizeof(uint64_t));
  }

  CudaWorkspace workspace_;
  std::string dtype_;
  int64_t blocks_ = 0;
  uint64_t* clock_ = nullptr;  // [blocks, kCudaPhases]
};

void Backward(const py::object& upstream, const py::object& residual, const py::object& gradient,
              uintptr_t stream) {
  const CudaArray up = Borrow(upstream, "upstream"), d = Borrow(residual, "residual"),
                  g = Borrow(gradient, "gradient");
  Require(d.shape.size() == 2, "residual: expected shape [B, D], got " + d.ShapeText());
  const bool per_sample = up.shape.size() == 1;
  RequireArray(up, "upstream", d.dtype,
               per_sample ? std::vector<int64_t>{d.shape[0]} : std::vector<int64_t>{});
  RequireArray(g, "gradient", g.dtype, d.shape);
  const auto run = [&](auto feature, const std::string& center_dtype) {
    using Feature = decltype(feature);
    using Center = CenterType<Feature>;
    RequireArray(d, "residual", center_dtype, d.shape);
    Check(BackwardOnCuda<Feature>(static_cast<const Center*>(up.data), per_sample,
                                  static_cast<const Center*>(d.data), static_cast<Feature*>(g.data),
                                  d.shape[0], d.shape[1], reinterpret_cast<void*>(stream)),
          "launching the backward pass");
  };
  if (g.dtype == "float32") return run(float{}, "float32");
  if (g.dtype == "float64") return run(double{}, "float64");
  if (g.dtype == "float16") return run(Half{}, "float32");
  Require(g.dtype == "bfloat16",
          "gradient: expected dtype float32, float64, float16 or bfloat16, got " + g.dtype);
  run(BFloat16{}, "float32");
}

}  // namespace

void DefineCuda(py::module_& module) {
  py::class_<CudaBytes>(module, "CudaBytes", "Bytes in the memory of a GPU.")
      .def_property_readonly("__cuda_array_interface__", &CudaBytes::Interface);
  py::class_<CudaStep>(module, "CudaStep", R"(Steps on arrays in the memory of the current GPU.

Arrays may be of any library with DLPack or __cuda_array_interface__. Batches of up to [batch, dim]
run one after another on one stream. With atomic=True residuals are summed by float atomics, and
the bits of the moved centers differ from run to run. `tuning` sets launch constants by name, see
cuda_tuning(). With phases=True a launch of the whole batch records the time of each point, see
phases().)")
      .def(py::init<int64_t, int64_t, const std::string&, bool, const std::map<std::string, int>&,
                    bool>(),
           py::arg("batch"), py::arg("dim"), py::arg("dtype") = "float32", py::kw_only(),
           py::arg("atomic") = false, py::arg("tuning") = std::map<std::string, int>(),
           py::arg("phases") = false)
      .def("phases", &CudaStep::Phases,
           "[(point, first, last)] of the last launch: the times at which the first and the last "
           "block "
           "passed the point, in microseconds after the first block began. Waits for the device.")
      .def_property_readonly("workspace",
                             py::cpp_function(&CudaStep::Workspace, py::keep_alive<0, 1>()),
                             "The workspace of the launches, as bytes on the device.")
      .def("__call__", &CudaStep::Run, py::arg("features"), py::arg("labels"), py::arg("centers"),
           py::arg("loss") = py::none(), py::arg("residual") = py::none(),
           py::arg("squared_distance") = py::none(), py::kw_only(), py::arg("alpha") = 0.5,
           py::arg("rule") = "paper", py::arg("reduction") = "mean",
           py::arg("sample_weight") = py::none(), py::arg("ignore_class") = py::none(),
           py::arg("update_centers") = true, py::arg("loss_weight") = 1.0,
           py::arg("features_are_residuals") = false, py::arg("stream") = 0,
           R"(One launch on the stream (a cudaStream_t as an int). Returns without waiting for it.

Writes loss ([], or [B] for reduction "none"), residual [B, D] and squared_distance [B] if given, in
the centers' type, and the centers in place; none of them may overlap another array. alpha and
loss_weight may be arrays of shape [] on the device. A label out of range makes the loss and the
residual of its sample NaN. Raises ValueError, and then nothing is written.)");
  module.def(
      "cuda_tuning",
      [] {
        std::map<std::string, int> defaults;
        for (const CudaTuningField& field : kCudaTuning) {
          defaults[field.name] = CudaTuning().*field.value;
        }
        return defaults;
      },
      "The launch constants of cuda/center_loss_cuda.h as {name: default}.");
  module.def(
      "cuda_backward", Backward, py::arg("upstream"), py::arg("residual"), py::arg("gradient"),
      py::kw_only(), py::arg("stream") = 0,
      "gradient [B, D] = upstream ([] or [B]) * residual [B, D], rounded to gradient's type.");
}

}  // namespace tcl
