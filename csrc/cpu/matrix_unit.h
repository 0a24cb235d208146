// Intel's matrix unit (AMX): 8 registers of 16 rows of 64 bytes, and their products of bfloat16 summed in float32.
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

}  // namespace
}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
#endif
