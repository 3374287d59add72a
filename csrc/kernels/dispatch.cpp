// Which kernels this processor can run.
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bitvla {

const Kernels* const* available_kernels() {
  static const Kernels* list[4] = {};
  static const bool filled = [] {
    const Kernels** next = list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      *next++ = &kAvx512Vnni;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *next++ = &kAvx2;
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) *next++ = &kNeon;
#elif defined(__aarch64__) && defined(__APPLE__)
    *next++ = &kNeon;  // every Apple processor with this architecture has the dot product
#endif
    *next = &kScalar;
    return true;
  }();
  (void)filled;
  return list;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    if (!std::strcmp((*k)->name, name)) return *k;
  }
  return nullptr;
}

}  // namespace bitvla
