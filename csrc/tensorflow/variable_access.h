// Access to the table of centers behind a resource variable.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_VARIABLE_ACCESS_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_VARIABLE_ACCESS_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/platform/mutex.h"

namespace tcl {

inline absl::Status FindVariable(tensorflow::OpKernelContext* context, int input,
                                 tensorflow::core::RefCountPtr<tensorflow::Var>* variable) {
  const tensorflow::ResourceHandle& handle = tensorflow::HandleFromInput(context, input);
  if (!tensorflow::LookupResource(context, handle, variable).ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("centers: variable '", handle.name(),
                     "' is not initialised; run its initializer before the first step"));
  }
  return absl::OkStatus();
}

inline absl::Status CheckInitialized(const tensorflow::Tensor& tensor) {
  if (tensor.IsInitialized()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "centers: the variable is not initialised; run its initializer before the first step");
}

// Calls body(tensor) with the variable locked for writing, so that rows of the tensor can be
// written in place.
//
// Whoever read the variable before may still hold its buffer: own(tensor) then puts a buffer of its
// own in its place. Turning copy_on_read_mode on makes every later dense read a copy, so that one
// copy at most is ever made here. The flag is tested under the lock: a checkpoint clears it and
// takes the buffer under the same lock, and a test before locking could miss that and write into
// the checkpoint's buffer.
template <typename Own, typename Body>
absl::Status WithWritableVariable(tensorflow::OpKernelContext* context, int input, Own own,
                                  Body body) {
  tensorflow::core::RefCountPtr<tensorflow::Var> variable;
  TF_RETURN_IF_ERROR(FindVariable(context, input, &variable));
  tensorflow::mutex_lock lock(*variable->mu());
  tensorflow::Tensor* const tensor = variable->tensor();
  TF_RETURN_IF_ERROR(CheckInitialized(*tensor));
  if (!variable->copy_on_read_mode.load()) {
    TF_RETURN_IF_ERROR(own(tensor));
    variable->copy_on_read_mode.store(true);
  }
  return body(tensor);
}

// Calls body(tensor) with the variable locked for reading: no reference to its buffer outlives the
// lock, so a later step need not copy it.
template <typename Body>
absl::Status WithReadableVariable(tensorflow::OpKernelContext* context, int input, Body body) {
  tensorflow::core::RefCountPtr<tensorflow::Var> variable;
  TF_RETURN_IF_ERROR(FindVariable(context, input, &variable));
  tensorflow::tf_shared_lock lock(*variable->mu());
  TF_RETURN_IF_ERROR(CheckInitialized(*variable->tensor()));
  return body(variable->tensor());
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_VARIABLE_ACCESS_H_
