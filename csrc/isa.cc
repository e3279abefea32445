// Tests the processor with the compiler's __builtin_cpu_supports, which also checks that the
// operating system saves the wide registers.

#include "csrc/isa.h"

#include "csrc/numeric_types.h"
#include "csrc/row_loops.h"

namespace tcl {

// Each compilation of row_loops.cc defines Loops() in the namespace of its instruction set.
namespace baseline {
template <typename Feature>
const RowLoops<Feature>& Loops();
}
#if defined(TCL_HAVE_X86_ISAS)
namespace avx2 {
template <typename Feature>
const RowLoops<Feature>& Loops();
}
namespace avx512 {
template <typename Feature>
const RowLoops<Feature>& Loops();
}
#endif

namespace {

constexpr struct {
  const char* name;
  Isa isa;
} kIsas[] = {{"baseline", Isa::kBaseline}, {"avx2", Isa::kAvx2}, {"avx512", Isa::kAvx512}};

}  // namespace

bool IsSupported(Isa isa) {
#if defined(TCL_HAVE_X86_ISAS)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return IsSupported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa BestIsa() {
  static const Isa best = IsSupported(Isa::kAvx512) ? Isa::kAvx512
                          : IsSupported(Isa::kAvx2) ? Isa::kAvx2
                                                    : Isa::kBaseline;
  return best;
}

std::vector<std::string> SupportedIsaNames() {
  std::vector<std::string> names;
  for (const auto& known : kIsas) {
    if (IsSupported(known.isa)) names.emplace_back(known.name);
  }
  return names;
}

bool ParseIsa(const std::string& name, Isa* isa) {
  if (name == "auto") {
    *isa = BestIsa();
    return true;
  }
  for (const auto& known : kIsas) {
    if (name != known.name || !IsSupported(known.isa)) continue;
    *isa = known.isa;
    return true;
  }
  return false;
}

template <typename Feature>
const RowLoops<Feature>& GetRowLoops(Isa isa) {
#if defined(TCL_HAVE_X86_ISAS)
  if (isa == Isa::kAvx512) return avx512::Loops<Feature>();
  if (isa == Isa::kAvx2) return avx2::Loops<Feature>();
#endif
  return baseline::Loops<Feature>();
}

template const RowLoops<float>& GetRowLoops(Isa);
template const RowLoops<double>& GetRowLoops(Isa);
template const RowLoops<Half>& GetRowLoops(Isa);
template const RowLoops<BFloat16>& GetRowLoops(Isa);

}  // namespace tcl
