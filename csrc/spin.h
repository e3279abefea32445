// A bounded spin-wait for short waits between threads: waking a sleeping thread takes longer than a
// small step.
//
// C++17 has no std::atomic::wait, and condition variables as well as absl's Notification and
// BlockingCounter put the thread to sleep at once; hence this loop.

#ifndef TF_CENTER_LOSS_OP_CSRC_SPIN_H_
#define TF_CENTER_LOSS_OP_CSRC_SPIN_H_

namespace tcl {

// Polls done() for some tens of microseconds at most. Returns its last result.
template <typename Done>
bool SpinUntil(Done done) {
  constexpr int kMaxPolls = 1000;
  for (int poll = 0; poll < kMaxPolls; ++poll) {
    if (done()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return done();
}

}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CSRC_SPIN_H_
