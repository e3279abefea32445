// Signatures and shape functions of the ops. Features are [B, D] here: Python flattens [..., D].

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

// features [B, D] and labels [B] agree with each other and with centers [C, D] as far as known.
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

// alpha [], loss_weight [] and sample_weight [B], as far as the op has them, are the inputs from
// next on.
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

// The residual leaves the forward ops as the bits of its numbers, in the integer type of the same
// width. TensorFlow makes a zero gradient of full size for every floating-point output that nobody
// differentiates, in every backward pass; for an integer output it does not. Unsigned, because
// TensorFlow takes every int32 of a function's results back to the host.
#define TCL_BITS_ATTR Attr("Tbits: {uint32, int64}")

// What may be left out is a list of none or one, of the centers' type. A number that is known while
// tracing stands in the op itself: a node less that runs in each step.
#define TCL_OPTIONAL_ATTR(Name) Attr("T" Name ": list({float, double}) >= 0")
#define TCL_ALPHA_ATTRS TCL_OPTIONAL_ATTR("alpha").Attr("constant_alpha: float = 0")
#define TCL_WEIGHT_ATTRS                       \
  TCL_OPTIONAL_ATTR("loss_weight")             \
      .Attr("constant_loss_weight: float = 1") \
      .TCL_OPTIONAL_ATTR("sample_weight")

// Only for a GPU, see CudaOptions::atomic.
#define TCL_ATOMIC_ATTR Attr("atomic: bool = false")

// What a step comes after under XLA, which knows no order but that of data (xla_kernels.cc); no
// kernel reads it.
#define TCL_AFTER Input("after: Tafter").Attr("Tafter: list(type) >= 0 = []")

}  // namespace

// Loss, residual, ||x_i - c_{y_i}||^2 and the step of the centers, in one pass over the batch.
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

// The same without the step; nothing is written.
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

// The step of the centers alone. With `from_residual`, features hold the residual x_i - c_{y_i} of
// an earlier forward pass, and the centers as they are now do not enter it.
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

// A table of zeros on large pages, which take up memory only when they are written. Stateful, so
// that no optimizer makes a constant of it or shares one table among two variables.
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

// The backward pass: upstream, which is one where it is left out, times residual, in the features'
// type. Where upstream is one and the types are the same, the residual's own buffer is the
// gradient. The other inputs are not read: they are what the gradient of this op is taken to. A
// list of handles may be empty, and other than an input of type resource it does not mark the op as
// stateful, which could then not be left out.
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
