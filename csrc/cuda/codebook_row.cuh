// What the codebook kernels do with a row of logits: how its codes are dealt out to the threads of a block, its noise,
// maxima and sums, and the types in memory.
//
// Everything is float32 between a load and a store. exp(x) is exp2(x * log2(e)): exp2 is the hardware's instruction.
//
// Loops over the values of a thread have to be unrolled, or the values would have to have addresses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>

#include "../codebook.h"
#include "../gumbel.h"
#include "../philox.h"
#include "block.cuh"

namespace dalle_fast {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void to_type(float* p, float x) { *p = x; }
__device__ void to_type(__half* p, float x) { *p = __float2half_rn(x); }
__device__ void to_type(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// -- codes of a thread ------------------------------------------------------------------------------------------------

// A counter of Philox has the noise of 4 codes, 16 apart.
constexpr int kCodes = 4;

// Values of the codes of a counter, or of 4 neighbouring codes: one load or store of shared memory.
struct alignas(16) Four {
    float of[kCodes];
};

// A thread takes 4 neighbouring counters at a time and with them 4 times 4 neighbouring codes, so that each 4 are one
// load or store of memory and no word of the noise is exchanged or thrown away.
constexpr int kItemFours = 4, kItemCodes = kItemFours * kCodes, kBlockItems = kNoiseBlock / kItemCodes;

struct Item {
    float of[kItemCodes];
};

DALLE_FAST_HOST_DEVICE inline unsigned num_items(int64_t K) {
    return unsigned((K + kNoiseBlock - 1) / kNoiseBlock * kBlockItems);
}

// Of the 4 neighbours.
__device__ unsigned first_code(unsigned item, int four) {
    return item / kBlockItems * kNoiseBlock + four * kNoiseLanes + item % kBlockItems * kCodes;
}

// Ascending in n.
__device__ unsigned code_of_item(unsigned item, int n) { return first_code(item, n / kCodes) + n % kCodes; }

// 4 neighbours in memory, one load or store.
template <class T>
struct alignas(kCodes * sizeof(T)) Pack {
    T of[kCodes];
};

// A row of K codes. Only where matrices and K are aligned for it, kPacked, are 4 codes one load or store.
template <class T, bool kPacked>
struct Row {
    T* codes;
    unsigned K;
};

// Are all codes of the item in the row? Then its loads or stores share an address and have no conditions; only the last 4
// items of a row can have fewer.
template <class T, bool kPacked>
__device__ bool has_all_of(const Row<T, kPacked>& row, unsigned item) {
    return code_of_item(item, kItemCodes - 1) < row.K;
}

// Codes past the end of the row are `padding`.
template <class T, bool kPacked>
__device__ Item load_item(const Row<T, kPacked>& row, unsigned item, float padding) {
    Item x;
    if constexpr (kPacked) {
        if (has_all_of(row, item)) {
            const auto packs = reinterpret_cast<const Pack<T>*>(row.codes + first_code(item, 0));
#pragma unroll
            for (int four = 0; four < kItemFours; ++four) {
                const Pack<T> pack = packs[four * kNoiseLanes / kCodes];
                for (int n = 0; n < kCodes; ++n) x.of[four * kCodes + n] = to_float(pack.of[n]);
            }
            return x;
        }
    }
#pragma unroll
    for (int four = 0; four < kItemFours; ++four) {
        const unsigned code = first_code(item, four);
        float* const of = x.of + four * kCodes;
        if constexpr (kPacked) {
            if (code < row.K) {
                const auto pack = *reinterpret_cast<const Pack<T>*>(row.codes + code);
                for (int n = 0; n < kCodes; ++n) of[n] = to_float(pack.of[n]);
            } else {
                for (int n = 0; n < kCodes; ++n) of[n] = padding;
            }
        } else {
            for (int n = 0; n < kCodes; ++n) of[n] = code + n < row.K ? to_float(row.codes[code + n]) : padding;
        }
    }
    return x;
}

template <class T, bool kPacked>
__device__ void store_item(const Row<T, kPacked>& row, unsigned item, const Item& x) {
    if constexpr (kPacked) {
        if (has_all_of(row, item)) {
            const auto packs = reinterpret_cast<Pack<T>*>(row.codes + first_code(item, 0));
#pragma unroll
            for (int four = 0; four < kItemFours; ++four) {
                Pack<T> pack;
                for (int n = 0; n < kCodes; ++n) to_type(pack.of + n, x.of[four * kCodes + n]);
                packs[four * kNoiseLanes / kCodes] = pack;
            }
            return;
        }
    }
#pragma unroll
    for (int four = 0; four < kItemFours; ++four) {
        const unsigned code = first_code(item, four);
        Pack<T> pack;
        for (int n = 0; n < kCodes; ++n) to_type(pack.of + n, x.of[four * kCodes + n]);
        if constexpr (kPacked) {
            if (code < row.K) *reinterpret_cast<Pack<T>*>(row.codes + code) = pack;
        } else {
            for (int n = 0; n < kCodes; ++n)
                if (code + n < row.K) row.codes[code + n] = pack.of[n];
        }
    }
}

__device__ Item plus(const Item& x, const Item& y) {
    Item sum;
#pragma unroll
    for (int n = 0; n < kItemCodes; ++n) sum.of[n] = x.of[n] + y.of[n];
    return sum;
}

// Logits and what is added to them. Past the end of the row they are -inf, which no maximum and no sum of exponentials
// notices.
template <class T, bool kPacked>
struct LogitsOfRow {
    Row<const T, kPacked> logits;
    const float* bias;  // or null

    __device__ Item load(unsigned item) const {
        const Item z = load_item(logits, item, -INFINITY);
        return bias ? plus(z, load_item(Row<const float, kPacked>{bias, logits.K}, item, 0.0f)) : z;
    }
};

template <bool kPacked>
__device__ LogitsOfRow<float, kPacked> logits_of_row(const LogitRows& x, int64_t row) {
    return {{x.logits + row * x.K, unsigned(x.K)}, x.bias};
}

// A row of results, at the start of the memory of a row of K floats.
template <class T, bool kPacked>
__device__ Row<T, kPacked> result_row(void* matrix, int64_t row, int64_t K) {
    return {reinterpret_cast<T*>(static_cast<float*>(matrix) + row * K), unsigned(K)};
}

// Between a pass's loads from a row and its stores into the same memory. Of the same width, a thread stores where it
// alone has loaded. Narrower codes lie before the floats that they are made from: what the threads store together lies
// where they loaded together in this step or in an earlier one, never in a later one.
template <class T>
__device__ void before_store_in_place() {
    if (sizeof(T) < sizeof(float)) __syncthreads();
}

// -- what a thread keeps in shared memory for itself ------------------------------------------------------------------

__device__ void keep(Four* kept, unsigned items, unsigned item, const Item& x) {
#pragma unroll
    for (int four = 0; four < kItemFours; ++four) {
        Four part;
        for (int n = 0; n < kCodes; ++n) part.of[n] = x.of[four * kCodes + n];
        kept[four * items + item] = part;  // neighbouring threads at neighbouring places
    }
}

__device__ Item kept_item(const Four* kept, unsigned items, unsigned item) {
    Item x;
#pragma unroll
    for (int four = 0; four < kItemFours; ++four) {
        const Four part = kept[four * items + item];
        for (int n = 0; n < kCodes; ++n) x.of[four * kCodes + n] = part.of[n];
    }
    return x;
}

// -- noise ------------------------------------------------------------------------------------------------------------

struct RowNoise {
    uint64_t seed, row;
};

__device__ RowNoise noise_of_row(const NoiseRows& noise, int64_t row) {
    return {uint64_t(noise.seed[noise.seed_per_row ? row : 0]),
            noise.seed_per_row ? 0 : uint64_t(noise.first_row) + uint64_t(row)};
}

__device__ Four noise_of(const RowNoise& noise, unsigned counter) {
    const PhiloxWords<uint64_t> words = philox_words(noise.seed, noise.row, counter);
    Four g;
    for (int w = 0; w < kCodes; ++w) g.of[w] = gumbel_noise<ScalarLanes>(uint32_t(words.word[w]));
    return g;
}

__device__ Item noise_of_item(const RowNoise& noise, unsigned item) {
    Item g;
#pragma unroll
    for (int n = 0; n < kItemFours; ++n) {
        const Four of_counter = noise_of(noise, item * kItemFours + n);
        for (int w = 0; w < kCodes; ++w) g.of[w * kCodes + n] = of_counter.of[w];
    }
    return g;
}

// -- maxima -----------------------------------------------------------------------------------------------------------

// Functors, not lambdas: reductions in different kernels share their text.
struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }  // passes over NaN: sums will show it
};

constexpr unsigned kNoCode = 0xffffffffu;

// The largest value and the first code that has it.
struct Best {
    float value;
    unsigned code;
};

struct Better {
    __device__ Best operator()(const Best& a, const Best& b) const {
        return b.value > a.value || (b.value == a.value && b.code < a.code) ? b : a;
    }
};

// Items must come in ascending order.
__device__ void take_better(Best& best, unsigned item, const Item& t) {
#pragma unroll
    for (int n = 0; n < kItemCodes; ++n)
        if (t.of[n] > best.value) best = {t.of[n], code_of_item(item, n)};
}

// In [0, K) even if nothing was larger than -inf.
__device__ int64_t found_code(unsigned code, int64_t K) { return code < K ? code : 0; }

__device__ float larger_of(float max, const Item& x) {
#pragma unroll
    for (int n = 0; n < kItemCodes; ++n) max = fmaxf(max, x.of[n]);
    return max;
}

// -- exponentials -----------------------------------------------------------------------------------------------------

// exp2(x), 0 where it would be below 2^-126: without a detour for such numbers the hardware's instruction is all of it.
__device__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// log2(e) / tau. Finite even where 1 / tau is not, since the largest value has 0 times this as exponent.
__device__ float exponent_scale(float tau) {
    const float scale = kLog2e / tau;
    return scale > FLT_MAX ? FLT_MAX : scale;  // NaN stays
}

__device__ float reciprocal_of_tau(float tau) {
    const float reciprocal = 1.0f / tau;
    return reciprocal > FLT_MAX ? FLT_MAX : reciprocal;
}

// A maximum to subtract: -inf minus -inf would be NaN, and a thread may have met nothing else.
__device__ float finite_below(float max) { return fmaxf(max, -FLT_MAX); }

// sum exp2((x - max) * scale) of the values so far.
struct RunningSum {
    float max, sum;
};

__device__ void add_exponentials(RunningSum& s, const Item& x, float scale) {
    float max = s.max;
#pragma unroll
    for (float value : x.of) max = fmaxf(max, value);
    if (max > s.max) {
        s.sum *= exp2_of((finite_below(s.max) - max) * scale);
        s.max = max;
    }
    const float shift = finite_below(s.max);
#pragma unroll
    for (float value : x.of) s.sum += exp2_of((value - shift) * scale);
}

struct Plus {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// A thread's sum, relative to the row's maximum.
__device__ float rescaled_sum(const RunningSum& s, float row_max, float scale) {
    return s.sum * exp2_of((finite_below(s.max) - finite_below(row_max)) * scale);
}

}  // namespace
}  // namespace dalle_fast
