// What this CPU has and its operating system saves: cpuid and xgetbv, or Linux's word for it, asked once.
#pragma once

namespace specquant {

bool cpu_has_avx2();        // with FMA and F16C
bool cpu_has_avxvnni();     // and AVX-VNNI
bool cpu_has_avx512vnni();  // F, BW, DQ, VL and VNNI on top of AVX2
bool cpu_has_amx();         // AMX-INT8 on top of that, and this process may use it: asks the system on the first call
bool cpu_has_dotprod();     // aarch64: FEAT_DotProd
bool cpu_has_i8mm();        // aarch64: FEAT_I8MM on top of that

}  // namespace specquant
