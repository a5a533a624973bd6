// Which kernels were compiled, which of them run here, and which one is used.
#include <cstdio>
#include <cstring>

#include "steps.h"

namespace specquant {

const Kernels* const kCompiled[] = {
    &kScalar,
#ifdef SPECQUANT_AVX2
    &kAvx2,
#endif
#ifdef SPECQUANT_AVXVNNI
    &kAvxVnni,
#endif
#ifdef SPECQUANT_AVX512VNNI
    &kAvx512Vnni,
#endif
#ifdef SPECQUANT_AMX
    &kAmx,
#endif
#ifdef SPECQUANT_NEON
    &kNeon,
#endif
#ifdef SPECQUANT_DOTPROD
    &kDotProd,
#endif
#ifdef SPECQUANT_I8MM
    &kI8mm,
#endif
    nullptr,
};

bool supported(const Kernels& kernels) { return kernels.supported(); }

const Kernels* select(const char* name, char* error, size_t size) {
  const bool any = name == nullptr || *name == '\0';
  const Kernels* fastest = nullptr;
  char names[64] = "";
  for (const Kernels* const* it = kCompiled; *it; ++it) {
    if (!supported(**it)) continue;
    if (!any && std::strcmp((*it)->name, name) == 0) return *it;
    fastest = *it;
    std::snprintf(names + std::strlen(names), sizeof names - std::strlen(names), " %s", (*it)->name);
  }
  if (any) return fastest;
  std::snprintf(error, size, "SPECQUANT_ISA is %.32s, which this CPU or this build lacks; set it to one of:%s", name,
                names);
  return nullptr;
}

}  // namespace specquant
