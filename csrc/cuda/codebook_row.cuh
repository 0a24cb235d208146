// What the codebook kernels do with a row of logits: how its codes are dealt out to the threads of a block, its noise,
// maxima and sums, and the types in memory.
//
// Everything is float32 between a load and a store. exp(x) is exp2(x * log2(e)): exp2 is the hardware's instruction.
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

__device__ void store(float* p, float x) { *p = x; }
__device__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// -- codes of a thread ------------------------------------------------------------------------------------------------

// A counter of Philox has the noise of 4 codes, 16 apart. A thread takes a counter and with it these codes, so that
// neighbouring threads meet neighbouring codes and no word is exchanged or thrown away.
constexpr int kCodes = 4;

// Values of the codes of a counter, one load or store of shared memory.
struct alignas(16) Four {
    float of[kCodes];
};

DALLE_FAST_HOST_DEVICE inline unsigned num_counters(int64_t K) {
    return unsigned((K + kNoiseBlock - 1) / kNoiseBlock * kNoiseLanes);
}

__device__ unsigned code_of(unsigned counter, int word) {
    return counter / kNoiseLanes * kNoiseBlock + word * kNoiseLanes + counter % kNoiseLanes;
}

// logit + bias. Codes past the end of the row are -inf, which no maximum and no sum of exponentials notices.
template <class T>
__device__ Four load_logits(const T* row, const float* bias, unsigned K, unsigned counter) {
    Four z;
    for (int w = 0; w < kCodes; ++w) {
        const unsigned code = code_of(counter, w);
        z.of[w] = code < K ? to_float(row[code]) + (bias ? bias[code] : 0.0f) : -INFINITY;
    }
    return z;
}

template <class T>
__device__ void store_codes(T* row, unsigned K, unsigned counter, const Four& x) {
    for (int w = 0; w < kCodes; ++w)
        if (const unsigned code = code_of(counter, w); code < K) store(row + code, x.of[w]);
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

__device__ Four plus(const Four& x, const Four& y) {
    Four sum;
    for (int w = 0; w < kCodes; ++w) sum.of[w] = x.of[w] + y.of[w];
    return sum;
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

// Codes must come in ascending order.
__device__ void take_better(Best& best, unsigned counter, const Four& t) {
    for (int w = 0; w < kCodes; ++w)
        if (t.of[w] > best.value) best = {t.of[w], code_of(counter, w)};
}

// In [0, K) even if nothing was larger than -inf.
__device__ int64_t found_code(const Best& best) { return best.code == kNoCode ? 0 : best.code; }

// -- exponentials -----------------------------------------------------------------------------------------------------

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

__device__ void add_exponentials(RunningSum& s, const Four& x, float scale) {
    float max = s.max;
    for (int w = 0; w < kCodes; ++w) max = fmaxf(max, x.of[w]);
    if (max > s.max) {
        s.sum *= exp2f((finite_below(s.max) - max) * scale);
        s.max = max;
    }
    const float shift = finite_below(s.max);
    for (int w = 0; w < kCodes; ++w) s.sum += exp2f((x.of[w] - shift) * scale);
}

struct Plus {
    __device__ float operator()(float a, float b) const { return a + b; }
};

// A thread's sum, relative to the row's maximum.
__device__ float rescaled_sum(const RunningSum& s, float row_max, float scale) {
    return s.sum * exp2f((finite_below(s.max) - finite_below(row_max)) * scale);
}

}  // namespace
}  // namespace dalle_fast
