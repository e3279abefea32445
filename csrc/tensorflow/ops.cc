// Registers the ops: their signatures and shape functions. The shape functions
// report shape errors at trace time; the kernels (step_ops.h) check again what is unknown then.
// Features are [B, D] here, because the Python package flattens [..., D].

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tcl {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

struct BatchShape {
  DimensionHandle batch;
  DimensionHandle dim;
};

absl::Status Mismatch(InferenceContext* c, const char* name, ShapeHandle got,
                      const std::string& expected) {
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": expected shape ", expected, ", got ", c->DebugString(got)));
}

// Checks that features [B, D] and labels [B] agree with each other and with centers [C, D], as far
// as the shapes are known. `centers` < 0: the op has no such input.
absl::Status CheckBatch(InferenceContext* c, int centers, int features, int labels,
                        BatchShape* out) {
  ShapeHandle feature_shape, label_shape;
  if (!c->WithRank(c->input(features), 2, &feature_shape).ok()) {
    return Mismatch(c, "features", c->input(features), "[B, D]");
  }
  if (!c->WithRank(c->input(labels), 1, &label_shape).ok() ||
      !c->Merge(c->Dim(feature_shape, 0), c->Dim(label_shape, 0), &out->batch).ok()) {
    return Mismatch(c, "labels", c->input(labels),
                    absl::StrCat("[B] of features ", c->DebugString(feature_shape)));
  }
  out->dim = c->Dim(feature_shape, 1);
  if (centers < 0) return absl::OkStatus();

  const auto* handle = c->input_handle_shapes_and_types(centers);
  if (handle == nullptr || handle->empty()) return absl::OkStatus();
  ShapeHandle center_shape;
  if (!c->WithRank((*handle)[0].shape, 2, &center_shape).ok() ||
      !c->Merge(c->Dim(center_shape, 1), out->dim, &out->dim).ok()) {
    return Mismatch(c, "centers", (*handle)[0].shape,
                    absl::StrCat("[C, D] of features ", c->DebugString(feature_shape)));
  }
  tensorflow::DataType expected;
  TF_RETURN_IF_ERROR(c->GetAttr("Tcenters", &expected));
  const tensorflow::DataType got = (*handle)[0].dtype;
  if (got != expected && got != tensorflow::DT_INVALID) {
    return absl::InvalidArgumentError(absl::StrCat("centers: expected dtype ",
                                                   tensorflow::DataTypeString(expected), ", got ",
                                                   tensorflow::DataTypeString(got)));
  }
  return absl::OkStatus();
}

// Checks the optional inputs alpha [], loss_weight [] and sample_weight [B], which begin at input
// `next`.
absl::Status CheckOptional(InferenceContext* c, int next, DimensionHandle batch) {
  const auto check = [&](const char* attr, const char* name, ShapeHandle expected) {
    std::vector<tensorflow::DataType> types;
    if (!c->GetAttr(attr, &types).ok()) return absl::OkStatus();
    for (const int end = next + static_cast<int>(types.size()); next < end; ++next) {
      ShapeHandle unused;
      if (!c->Merge(c->input(next), expected, &unused).ok()) {
        return Mismatch(c, name, c->input(next), c->DebugString(expected));
      }
    }
    return absl::OkStatus();
  };
  TF_RETURN_IF_ERROR(check("Talpha", "alpha", c->Scalar()));
  TF_RETURN_IF_ERROR(check("Tloss_weight", "loss_weight", c->Scalar()));
  return check("Tsample_weight", "sample_weight", c->Vector(batch));
}

absl::Status SetLossOutputs(InferenceContext* c, const BatchShape& shape) {
  std::string reduction;
  TF_RETURN_IF_ERROR(c->GetAttr("reduction", &reduction));
  c->set_output(0, reduction == "none" ? c->Vector(shape.batch) : c->Scalar());
  c->set_output(1, c->Matrix(shape.batch, shape.dim));
  c->set_output(2, c->Vector(shape.batch));
  return absl::OkStatus();
}

#define TCL_BATCH_ATTRS                       \
  Attr("T: {float, double, half, bfloat16}")  \
      .Attr("Tcenters: {float, double}")      \
      .Attr("Tlabels: {int32, int64}")        \
      .Attr("has_ignore_class: bool = false") \
      .Attr("ignore_class: int = 0")

#define TCL_RULE_ATTR                                                                   \
  Attr(                                                                                 \
      "rule: {'paper', 'mean', 'sum', 'batch_mean', 'paper_batch_mean', 'tutorial'} = " \
      "'paper'")

#define TCL_REDUCTION_ATTR Attr("reduction: {'sum', 'mean', 'none'} = 'mean'")

// The forward ops output the scaled residual bitcast to an integer type of the same width. In every
// backward pass TensorFlow allocates a zero gradient of full size for each floating-point output
// whose gradient is unused, but not for an integer output. The 32-bit type is unsigned, because
// TensorFlow copies every int32 result of a function to the host.
#define TCL_BITS_ATTR Attr("Tbits: {uint32, int64}")

// An optional input is a list of length 0 or 1, of the centers' type. A number that is known at
// trace time is an attribute instead, which saves a graph node per step.
#define TCL_OPTIONAL_ATTR(Name) Attr("T" Name ": list({float, double}) >= 0")
#define TCL_ALPHA_ATTRS TCL_OPTIONAL_ATTR("alpha").Attr("constant_alpha: float = 0")
#define TCL_WEIGHT_ATTRS                       \
  TCL_OPTIONAL_ATTR("loss_weight")             \
      .Attr("constant_loss_weight: float = 1") \
      .TCL_OPTIONAL_ATTR("sample_weight")

// Read by the GPU kernels only, see CudaOptions::atomic.
#define TCL_ATOMIC_ATTR Attr("atomic: bool = false")

// Values that must be computed before the step. XLA orders operations by their data dependencies
// alone, see xla_kernels.cc; the kernels do not read these inputs.
#define TCL_AFTER Input("after: Tafter").Attr("Tafter: list(type) >= 0 = []")

}  // namespace

// Computes loss, scaled residual and ||x_i - c_{y_i}||^2 and updates the centers, in one pass over
// the batch.
REGISTER_OP("TclCenterLossStep")
    .Input("centers: resource")
    .Input("features: T")
    .Input("labels: Tlabels")
    .Input("alpha: Talpha")
    .Input("loss_weight: Tloss_weight")
    .Input("sample_weight: Tsample_weight")
    .TCL_AFTER.Output("loss: Tcenters")
    .Output("residual_bits: Tbits")
    .Output("squared_distance: Tcenters")
    .TCL_BATCH_ATTRS.TCL_BITS_ATTR.TCL_REDUCTION_ATTR.TCL_RULE_ATTR.TCL_ATOMIC_ATTR.TCL_ALPHA_ATTRS
    .TCL_WEIGHT_ATTRS.SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      BatchShape shape;
      TF_RETURN_IF_ERROR(CheckBatch(c, 0, 1, 2, &shape));
      TF_RETURN_IF_ERROR(CheckOptional(c, 3, shape.batch));
      return SetLossOutputs(c, shape);
    });

// Computes the same outputs and leaves the centers as they are.
REGISTER_OP("TclCenterLoss")
    .Input("centers: resource")
    .Input("features: T")
    .Input("labels: Tlabels")
    .Input("loss_weight: Tloss_weight")
    .Input("sample_weight: Tsample_weight")
    .Output("loss: Tcenters")
    .Output("residual_bits: Tbits")
    .Output("squared_distance: Tcenters")
    .TCL_BATCH_ATTRS.TCL_BITS_ATTR.TCL_REDUCTION_ATTR.TCL_WEIGHT_ATTRS.SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      BatchShape shape;
      TF_RETURN_IF_ERROR(CheckBatch(c, 0, 1, 2, &shape));
      TF_RETURN_IF_ERROR(CheckOptional(c, 3, shape.batch));
      return SetLossOutputs(c, shape);
    });

// Updates the centers only. With `from_residual`, features hold the residual x_i - c_{y_i} of an
// earlier forward pass, so the residual does not depend on the present centers.
REGISTER_OP("TclUpdateCenters")
    .Input("centers: resource")
    .Input("features: T")
    .Input("labels: Tlabels")
    .Input("alpha: Talpha")
    .TCL_AFTER.TCL_BATCH_ATTRS.TCL_RULE_ATTR.TCL_ATOMIC_ATTR.TCL_ALPHA_ATTRS
    .Attr("from_residual: bool = false")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      BatchShape shape;
      TF_RETURN_IF_ERROR(CheckBatch(c, 0, 1, 2, &shape));
      return CheckOptional(c, 3, shape.batch);
    });

// Allocates a table of zeros on huge pages, which use memory only once they are written. The op is
// stateful, so that Grappler neither folds it to a constant nor merges two of them into one table.
REGISTER_OP("TclZeros")
    .Input("shape: int64")
    .Output("zeros: dtype")
    .Attr("dtype: {float, double}")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle shape;
      TF_RETURN_IF_ERROR(c->MakeShapeFromShapeTensor(0, &shape));
      c->set_output(0, shape);
      return absl::OkStatus();
    });

// The backward pass: gradient = upstream * scaled residual, in the features' type; an absent
// upstream is 1. If upstream is 1 and the types are equal, the gradient shares the scaled
// residual's buffer.
//
// The kernels do not read the other inputs; second derivatives are taken with respect to them. The
// centers are a list of handles, which may be empty. A plain resource input would make the op
// stateful, and an unused stateful op is not pruned.
REGISTER_OP("TclCenterLossBackward")
    .Input("residual_bits: Tbits")
    .Input("upstream: Tupstream")
    .Input("features: T")
    .Input("labels: Tlabels")
    .Input("loss_weight: Tloss_weight")
    .Input("sample_weight: Tsample_weight")
    .Input("centers: handles")
    .Output("gradient: T")
    .TCL_BATCH_ATTRS.TCL_BITS_ATTR.TCL_REDUCTION_ATTR.TCL_WEIGHT_ATTRS.TCL_OPTIONAL_ATTR("upstream")
    .Attr("handles: list({resource}) >= 0")
    .SetShapeFn([](InferenceContext* c) {
      BatchShape shape;
      std::vector<tensorflow::DataType> upstream;
      TF_RETURN_IF_ERROR(c->GetAttr("Tupstream", &upstream));
      const int features = 1 + static_cast<int>(upstream.size());
      TF_RETURN_IF_ERROR(CheckBatch(c, -1, features, features + 1, &shape));
      c->set_output(0, c->Matrix(shape.batch, shape.dim));
      return absl::OkStatus();
    });

}  // namespace tcl
