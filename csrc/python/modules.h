// The parts of the Python module _kernels.

#ifndef TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_
#define TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_

#include <pybind11/pybind11.h>

namespace tcl {

// Adds the CUDA kernels to the module. Defined only if they are built (TCL_HAVE_CUDA).
void DefineCuda(pybind11::module_& module);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_PYTHON_MODULES_H_
