// Locks a resource variable and gives access to its tensor, the table of centers. This file knows
// TensorFlow's variables and none of the mathematics.

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
        absl::StrCat("centers: expected an initialised variable, got '", handle.name(),
                     "', which is not initialised; run its initializer before the first step"));
  }
  return absl::OkStatus();
}

inline absl::Status CheckInitialized(const tensorflow::Tensor& tensor) {
  if (tensor.IsInitialized()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "centers: expected an initialised variable, got one that is not initialised; run its "
      "initializer before the first step");
}

// Calls body(tensor) with the variable locked for writing, so that rows of the tensor can be
// written in place.
//
// An earlier read may still share the variable's buffer: unshare(tensor) then replaces it by a
// private copy. copy_on_read_mode makes every later dense read a copy, so that at most one copy is
// made here. TensorFlow's EnsureSparseVariableAccess does the same, but tests that flag before it
// takes the lock. A checkpoint clears the flag and takes the buffer under the lock, so a step could
// then write into the checkpoint's buffer. Here the flag is tested under the lock.
template <typename Unshare, typename Body>
absl::Status WithWritableVariable(tensorflow::OpKernelContext* context, int input, Unshare unshare,
                                  Body body) {
  tensorflow::core::RefCountPtr<tensorflow::Var> variable;
  TF_RETURN_IF_ERROR(FindVariable(context, input, &variable));
  tensorflow::mutex_lock lock(*variable->mu());
  tensorflow::Tensor* const tensor = variable->tensor();
  TF_RETURN_IF_ERROR(CheckInitialized(*tensor));
  if (!variable->copy_on_read_mode.load()) {
    TF_RETURN_IF_ERROR(unshare(tensor));
    variable->copy_on_read_mode.store(true);
  }
  return body(tensor);
}

// Calls body(tensor) with the variable locked for reading. No reference to the buffer outlives the
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
