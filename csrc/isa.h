// The instruction sets of the CPU kernels and the choice of one at run time.
//
// CMakeLists.txt compiles row_loops.cc once per instruction set. This file names the sets, tests
// which of them the processor supports and returns the row loops compiled for one of them. Every
// other file passes an Isa on and tests neither the processor nor a name. Nothing here knows what
// the loops compute.

#ifndef TF_CENTER_LOSS_OP_CSRC_ISA_H_
#define TF_CENTER_LOSS_OP_CSRC_ISA_H_

#include <string>
#include <vector>

namespace tcl {

template <typename Feature>
struct RowLoops;

enum class Isa {
  kBaseline,  // the target's minimum: SSE2 on x86-64, Advanced SIMD (NEON) on ARM64
  kAvx2,      // AVX2 and F16C; x86-64 only
  kAvx512,    // AVX-512 F, BW, DQ and VL, besides kAvx2; x86-64 only
};

// True if this build contains the loops for `isa` and the processor can execute them.
bool IsSupported(Isa isa);

// The widest supported instruction set.
Isa BestIsa();

// "baseline", "avx2" and "avx512", as far as they are supported.
std::vector<std::string> SupportedIsaNames();

// Parses one of SupportedIsaNames(), or "auto" as BestIsa(). Returns false for any other name.
bool ParseIsa(const std::string& name, Isa* isa);

// The loops compiled for `isa`, which must be supported.
template <typename Feature>
const RowLoops<Feature>& GetRowLoops(Isa isa);

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_ISA_H_
