#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dalle_fast {
namespace {

#if defined(__x86_64__)
bool cpu_has_f16c() {  // older compilers do not know its name in __builtin_cpu_supports
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c(); }

bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Compilers that cannot make the kernels for these do not know their names either.
#if defined(DALLE_FAST_WITH_avx512_bf16)
bool cpu_has_avx512_bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(DALLE_FAST_WITH_avx512_amx)
bool cpu_has_amx() {  // and the system lets this process use its registers
    unsigned a, b, c, d;
    if (!cpu_has_avx512() || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512bf16")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif
#endif

struct InstructionSet {
    const char* name;
    bool supported;  // by this CPU
    bool automatic;  // chosen unasked where supported
    const AttentionKernels& attention;
    const DecodeKernels& decode;
    const CodebookKernels& codebook;
    const LinearKernels& linear;
    const ProductKernels& product;
    const BlocksKernels& blocks;
};

// CMake defines DALLE_FAST_WITH_* for what it compiled. The plainest one first.
const std::vector<InstructionSet>& compiled() {
    static const std::vector<InstructionSet> sets = {
        {"portable", true, true,
         portable::attention_kernels, portable::decode_kernels, portable::codebook_kernels, portable::linear_kernels,
         portable::product_kernels, portable::blocks_kernels},
#if defined(DALLE_FAST_WITH_avx2)
        {"avx2", cpu_has_avx2(), true,
         avx2::attention_kernels, avx2::decode_kernels, avx2::codebook_kernels, avx2::linear_kernels,
         avx2::product_kernels, avx2::blocks_kernels},
#endif
#if defined(DALLE_FAST_WITH_avx512)
        {"avx512", cpu_has_avx512(), true,
         avx512::attention_kernels, avx512::decode_kernels, avx512::codebook_kernels, avx512::linear_kernels,
         avx512::product_kernels, avx512::blocks_kernels},
#endif
#if defined(DALLE_FAST_WITH_avx512_bf16)
        // Intel's cores issue vdpbf16ps at a quarter of the rate of a float32 FMA (measured on Sapphire Rapids): half
        // the multiply-adds. There bfloat16 is faster converted to float32, as avx512 does.
        {"avx512_bf16", cpu_has_avx512_bf16(), __builtin_cpu_is("amd") != 0,
         avx512_bf16::attention_kernels, avx512_bf16::decode_kernels, avx512_bf16::codebook_kernels,
         avx512_bf16::linear_kernels, avx512_bf16::product_kernels, avx512_bf16::blocks_kernels},
#endif
#if defined(DALLE_FAST_WITH_avx512_amx)
        {"avx512_amx", cpu_has_amx(), true,
         avx512_amx::attention_kernels, avx512_amx::decode_kernels, avx512_amx::codebook_kernels,
         avx512_amx::linear_kernels, avx512_amx::product_kernels, avx512_amx::blocks_kernels},
#endif
    };
    return sets;
}

const InstructionSet& choose() {
    const char* wanted = std::getenv("DALLE_FAST_ISA");
    const InstructionSet* best = nullptr;
    for (const InstructionSet& set : compiled()) {
        if (!set.supported) continue;
        if (wanted && *wanted && set.name == std::string(wanted)) return set;
        if (set.automatic) best = &set;
    }
    if (!wanted || !*wanted) return *best;
    std::string message = "DALLE_FAST_ISA must be an instruction set that this build and this CPU have (";
    for (const std::string& name : instruction_sets()) message += (message.back() == '(' ? "" : ", ") + name;
    throw std::invalid_argument(message + "), got '" + wanted + "'");
}

const InstructionSet& active() {
    static const InstructionSet& set = choose();  // after a throw the next call tries again
    return set;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : compiled())
        if (set.supported) names.push_back(set.name);
    return names;
}

const char* instruction_set() { return active().name; }

const AttentionKernels& attention_kernels() { return active().attention; }
const DecodeKernels& decode_kernels() { return active().decode; }
const CodebookKernels& codebook_kernels() { return active().codebook; }
const LinearKernels& linear_kernels() { return active().linear; }
const ProductKernels& product_kernels() { return active().product; }
const BlocksKernels& blocks_kernels() { return active().blocks; }

}  // namespace dalle_fast
