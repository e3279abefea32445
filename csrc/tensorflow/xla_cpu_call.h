// The CPU kernel as an XLA custom call.

#ifndef TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CPU_CALL_H_
#define TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CPU_CALL_H_

#include "csrc/tensorflow/xla_hlo.h"

namespace tcl {

// The step as one call of the kernel of csrc/center_loss_cpu.h, which moves the centers in the
// buffer of the operand `in.centers`.
StepResults StepOnCpu(const StepKind& kind, const StepOperands& in);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_TENSORFLOW_XLA_CPU_CALL_H_
