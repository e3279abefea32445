// Waiting for another thread without sleeping: waking up takes longer than a small step.

#ifndef TF_CENTER_LOSS_OP_CSRC_SPIN_H_
#define TF_CENTER_LOSS_OP_CSRC_SPIN_H_

namespace tcl {

// Asks done() for some tens of microseconds at most; whether it came true.
template <typename Done>
bool SpinUntil(Done done) {
  constexpr int kTurns = 1000;
  for (int turn = 0; turn < kTurns; ++turn) {
    if (done()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return done();
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_SPIN_H_
