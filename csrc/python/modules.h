// The parts of the module _kernels.

#ifndef TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_
#define TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_

#include <pybind11/pybind11.h>

namespace tcl {

// Only where the CUDA kernels are built (TCL_HAVE_CUDA).
void DefineCuda(pybind11::module_& module);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_
