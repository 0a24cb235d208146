// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and which of its words belongs to
// which code. One text for scalars on host and device and for vectors on the CPU.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dalle_fast {

// What the text below needs of a lane type. `Wide` has 64 bits a lane, of which the low half counts.
struct ScalarPhilox {
    typedef uint64_t Wide;
    DALLE_FAST_INLINE uint64_t low_product(uint64_t x, uint32_t m) {
#if defined(__CUDA_ARCH__)
        uint64_t product;  // nvcc makes one of 64 by 64 bits of it, and adds the upper halves' 0
        asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(uint32_t(x)), "r"(m));
        return product;
#else
        return uint64_t(uint32_t(x)) * m;
#endif
    }
};

template <class Wide>
struct PhiloxWords {
    Wide word[4];
};

// One of ten rounds, with its key.
template <class Lanes>
DALLE_FAST_INLINE void philox_round(PhiloxWords<typename Lanes::Wide>& x, uint64_t key_low, uint64_t key_high) {
    typedef typename Lanes::Wide Wide;
    const Wide p = Lanes::low_product(x.word[0], 0xD2511F53u), q = Lanes::low_product(x.word[2], 0xCD9E8D57u);
    x.word[0] = (q >> 32) ^ x.word[1] ^ key_low;
    x.word[1] = q;
    x.word[2] = (p >> 32) ^ x.word[3] ^ key_high;
    x.word[3] = p;
}

constexpr int kPhiloxRounds = 10;

// What the key's halves grow by from round to round. The first round has the seed's halves.
constexpr uint32_t kPhiloxKeyLow = 0x9E3779B9u, kPhiloxKeyHigh = 0xBB67AE85u;

DALLE_FAST_INLINE PhiloxWords<uint64_t> philox4x32_10(PhiloxWords<uint64_t> x, uint32_t key_low, uint32_t key_high) {
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
        philox_round<ScalarPhilox>(x, key_low, key_high);
        key_low += kPhiloxKeyLow;
        key_high += kPhiloxKeyHigh;
    }
    return x;
}

// A counter holds (which 4 codes, row low, row high, 0). Its 4 words serve 4 codes that lie 16 apart, so that 16
// neighbouring lanes or threads with 16 neighbouring counters serve 64 neighbouring codes without an exchange.
// The definition in Python is noise_words in dalle_fast/ops/codebook/noise.py.
constexpr int kNoiseBlock = 64;  // codes
constexpr int kNoiseLanes = 16;  // counters of a block

DALLE_FAST_INLINE uint32_t noise_counter(int64_t code) {
    return uint32_t(code / kNoiseBlock * kNoiseLanes + code % kNoiseLanes);
}
DALLE_FAST_INLINE int noise_word(int64_t code) { return int(code % kNoiseBlock / kNoiseLanes); }

DALLE_FAST_INLINE PhiloxWords<uint64_t> philox_words(uint64_t seed, uint64_t row, uint32_t counter) {
    return philox4x32_10({{counter, row, row >> 32, 0}}, uint32_t(seed), uint32_t(seed >> 32));
}

}  // namespace dalle_fast
