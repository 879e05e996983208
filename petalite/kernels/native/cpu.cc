// Which instruction sets this processor has, and which of them is in use.
#include <cstring>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace petalite {
namespace {

bool runs(const Kernels& kernels) {
#if defined(__x86_64__)
    if (&kernels == &avx2_kernels)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&kernels == &avx512_kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
    const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
    if (&kernels == &neon_kernels) return dot;
    if (&kernels == &i8mm_kernels) return dot && (getauxval(AT_HWCAP2) & (1UL << 13)) != 0;  // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
    int i8mm = 0;
    size_t size = sizeof i8mm;
    if (&kernels == &neon_kernels) return true;  // all have it
    if (&kernels == &i8mm_kernels)
        return sysctlbyname("hw.optional.arm.FEAT_I8MM", &i8mm, &size, nullptr, 0) == 0 && i8mm != 0;
#endif
    return &kernels == &scalar_kernels;
}

const Kernels* const kTables[] = {  // best first
#if defined(__x86_64__)
    &avx512_kernels,
    &avx2_kernels,
#elif defined(__aarch64__)
    &i8mm_kernels,
    &neon_kernels,
#endif
    &scalar_kernels,
};

const Kernels* best() {
    for (const Kernels* table : kTables)
        if (runs(*table)) return table;
    return &scalar_kernels;
}

const Kernels* chosen = best();

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace petalite

// Name of the i-th instruction set that this library was built with, best first; null beyond the last.
PETALITE_API const char* petalite_table_name(int32_t i) {
    constexpr int32_t n = sizeof petalite::kTables / sizeof petalite::kTables[0];
    return i >= 0 && i < n ? petalite::kTables[i]->name : nullptr;
}

PETALITE_API int32_t petalite_table_runs(int32_t i) {
    return petalite_table_name(i) != nullptr && petalite::runs(*petalite::kTables[i]);
}

// Takes effect for products that begin afterwards; activations made ready by another table must be gone.
PETALITE_API void petalite_table_choose(int32_t i) {
    if (petalite_table_runs(i)) petalite::chosen = petalite::kTables[i];
}

PETALITE_API const char* petalite_table_chosen() { return petalite::chosen->name; }

// Digest of the sources that this library was built from (setup.py).
PETALITE_API const char* petalite_sources() { return PETALITE_SOURCES; }
