// Intel's matrix unit (AMX): 8 registers of 16 rows of 64 bytes, and their products of bfloat16 summed in float32.
//
// In functions of their own (DF_AMX), as few CPUs have it: defined where the compiler knows it, used where
// has_matrix_unit(). Where bfloat16 has a fast dot product there is none.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include "simd.h"

#if defined(__AVX512F__) && !defined(__AVX512BF16__) && defined(__linux__) && __GNUC__ >= 11
#define DF_AMX __attribute__((noinline, target("amx-tile,amx-bf16")))

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kUnit = 16;  // rows of a register, and its words of 32 bits in a row

bool has_matrix_unit() {
    static const bool has = [] {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
        constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of Linux, for this process
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return has;
}

// A thread works with the registers between these two. Other code never finds a configuration that is not its own.
DF_AMX void begin_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit};
    } config;
    __asm__ volatile("" : : "r"(&config) : "memory");  // written before it is loaded
    _tile_loadconfig(&config);
}

DF_AMX void end_tiles() { _tile_release(); }

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
