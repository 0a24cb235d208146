// Intel's matrix unit (AMX): 8 registers of 16 rows of 64 bytes, and their products of bfloat16 summed in float32.
//
// Kernels use four of them, two sums and two factors, and leave the others zero as a configuration does. Beside a busy thread
// of the same core it is as if an instruction that writes a register waited for a free one, and those that are zero took none:
// with four in use products take half as long there as with eight, though more factors are loaded twice, and elsewhere as
// long (measured on Sapphire Rapids, see benchmarks/NOTES.md).
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)
namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kUnit = 16;  // rows of a register, and its words of 32 bits in a row

// A thread works with the registers between these two. Other code never finds a configuration that is not its own.
DF_NOINLINE void begin_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit};
    } config;
    __asm__ volatile("" : : "r"(&config) : "memory");  // written before it is loaded
    _tile_loadconfig(&config);
}

DF_NOINLINE void end_tiles() { _tile_release(); }

// Sums are in the registers 0 and 1, and `stride` bytes lie between their rows in memory. Stored, they are zero.
DF_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
}
DF_INLINE void load_sums(const float* upper, const float* lower, int64_t stride) {
    _tile_loadd(0, upper, stride);
    _tile_loadd(1, lower, stride);
}
DF_INLINE void store_upper_sum(float* upper, int64_t stride) {
    _tile_stored(0, upper, stride);
    _tile_zero(0);
}
DF_INLINE void store_lower_sum(float* lower, int64_t stride) {
    _tile_stored(1, lower, stride);
    _tile_zero(1);
}

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
