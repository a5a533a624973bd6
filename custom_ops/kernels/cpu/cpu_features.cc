#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specquant {
namespace {

// Linux saves the 8 KB of tiles only for a process that asked for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, amx = false;

  Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !fma || !f16c) return;
    uint32_t saved, upper;
    __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    if ((saved & 0x06) != 0x06) return;  // xmm and ymm
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint32_t most_subleaf = a;
    avx2 = b >> 5 & 1;
    const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);  // F, DQ, BW, VL
    avx512vnni = avx2 && avx512 && (c >> 11 & 1) && (saved & 0xE0) == 0xE0;               // opmask and zmm
    amx = avx512vnni && (d >> 24 & 1) && (d >> 25 & 1) && (saved >> 17 & 3) == 3 && may_use_tiles();
    if (most_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = avx2 && (a >> 4 & 1);
  }
};

const Features& features() {
  static const Features found;
  return found;
}

}  // namespace

bool cpu_has_avx2() { return features().avx2; }
bool cpu_has_avxvnni() { return features().avxvnni; }
bool cpu_has_amx() { return features().amx; }
bool cpu_has_avx512vnni() { return features().avx512vnni; }

}  // namespace specquant

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace specquant {
namespace {

// Bits of the auxiliary vector, AT_HWCAP (16) and AT_HWCAP2 (26): older headers lack the names.
bool has(unsigned long vector, int bit) {
#if defined(__linux__)
  return getauxval(vector) >> bit & 1;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_dotprod() { return has(16, 20); }
bool cpu_has_i8mm() { return cpu_has_dotprod() && has(26, 13); }

}  // namespace specquant
#endif
