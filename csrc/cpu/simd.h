// Vectors of the instruction set a file is compiled for, in GCC's and Clang's vector types: arithmetic, comparison and
// selection are the language's own, only what differs by instruction set is spelled out here.
//
// Everything has internal linkage: each instruction set must keep its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DF_INLINE static inline __attribute__((always_inline))
#define DF_NOINLINE static __attribute__((noinline))
#define DF_INLINE_MEMBER inline __attribute__((always_inline))
#define DF_INLINE_LAMBDA __attribute__((always_inline))

namespace dalle_fast {
namespace DALLE_FAST_ISA {

#if defined(__AVX512F__)
constexpr int VW = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float Vec __attribute__((vector_size(VW * 4)));
typedef int32_t IntVec __attribute__((vector_size(VW * 4)));
typedef uint32_t WordVec __attribute__((vector_size(VW * 4)));
typedef float UnalignedVec __attribute__((vector_size(VW * 4), aligned(4), may_alias));

DF_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
DF_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
DF_INLINE Vec splat(float x) { return x - Vec{}; }

// Lane x is lane Lane::at(x) of the two vectors, b's counted after a's.
template <class Lane, class V, int... x>
DF_INLINE V shuffle_lanes(const V& a, const V& b, std::integer_sequence<int, x...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Lane::at(x)...);
#else
    return __builtin_shuffle(a, b, decltype(a == b){Lane::at(x)...});  // GCC's name for it before 12
#endif
}
template <class Lane, class V>
DF_INLINE V shuffle(const V& a, const V& b) {
    return shuffle_lanes<Lane>(a, b, std::make_integer_sequence<int, int(sizeof(V) / sizeof(V{}[0]))>());
}

DF_INLINE void prefetch_for_write(const void* p) {
#if defined(__AVX2__)
    __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
    __builtin_prefetch(p, 1);
#endif
}

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// f(a 0 of the dtype's type)
template <class F>
DF_INLINE auto with_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::float32: return f(float{});
        case DType::float16: return f(Half{});
        default: return f(BFloat16{});
    }
}

DF_INLINE float bits_to_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
DF_INLINE uint32_t float_to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

// -- one element ----------------------------------------------------------------------------------------------------

DF_INLINE float to_float(float x) { return x; }
DF_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
DF_INLINE float to_float(Half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
    if (rest >= 0x400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
    // Subnormal: in units of 2^-24, as the last bits of 0.5 are. Never a float that is subnormal, which a processor that
    // was told to flush them takes for 0.
    return bits_to_float(sign | float_to_bits(bits_to_float(0x3f000000 | rest) - 0.5f));
}

DF_INLINE void from_float(float x, float* out) { *out = x; }
DF_INLINE void from_float(float x, BFloat16* out) {
    const uint32_t bits = float_to_bits(x);
    out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DF_INLINE void from_float(float x, Half* out) {
    const uint32_t sign = float_to_bits(x) >> 16 & 0x8000, bits = float_to_bits(x) & 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) half = 0x7e00;
    else if (bits >= 0x477ff000) half = 0x7c00;  // rounds to 65520 and more
    else if (bits < 0x38800000) {                // subnormal: adding 0.5 rounds at its last bit
        half = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000;
    } else half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    out->bits = uint16_t(sign | half);
}

// -- a vector of them -------------------------------------------------------------------------------------------------

DF_INLINE Vec load_as_float(const float* p) { return load(p); }
DF_INLINE void store_from_float(float* p, Vec v) { store(p, v); }

#if defined(__AVX512F__)
DF_INLINE Vec load_as_float(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
DF_INLINE Vec load_as_float(const Half* p) {
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DF_INLINE void store_from_float(Half* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
DF_INLINE void store_from_float(BFloat16* p, Vec v) {
    const __m512i bits = _mm512_castps_si512((__m512)v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
#elif defined(__AVX2__)
DF_INLINE Vec load_as_float(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
DF_INLINE Vec load_as_float(const Half* p) {
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DF_INLINE void store_from_float(Half* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
DF_INLINE void store_from_float(BFloat16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256((__m256)v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
#else
template <class T>
DF_INLINE Vec load_as_float(const T* p) {
    Vec v;
    for (int x = 0; x < VW; ++x) v[x] = to_float(p[x]);
    return v;
}
#endif

template <class T>
DF_INLINE void store_from_float(T* p, Vec v) {
    for (int x = 0; x < VW; ++x) from_float(v[x], p + x);
}

// -- mathematics ------------------------------------------------------------------------------------------------------

DF_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
DF_INLINE Vec min(Vec a, Vec b) { return b < a ? b : a; }  // a where either is NaN
DF_INLINE IntVec min(IntVec a, IntVec b) { return a < b ? a : b; }

#if defined(__AVX512F__)
DF_INLINE float horizontal_max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
DF_INLINE float horizontal_sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
DF_INLINE int32_t horizontal_min(IntVec v) { return _mm512_reduce_min_epi32((__m512i)v); }
#else
DF_INLINE float horizontal_max(Vec v) {
    float m = v[0];
    for (int x = 1; x < VW; ++x) m = v[x] > m ? v[x] : m;
    return m;
}
DF_INLINE float horizontal_sum(Vec v) {
    float sum = 0;
    for (int x = 0; x < VW; ++x) sum += v[x];
    return sum;
}
DF_INLINE int32_t horizontal_min(IntVec v) {
    int32_t m = v[0];
    for (int x = 1; x < VW; ++x) m = v[x] < m ? v[x] : m;
    return m;
}
#endif

// 2^x for x <= 0 or a little above: 2^floor(x) times a degree-5 minimax polynomial of 2^(x - floor(x)), relative error
// 2e-7. NaN stays NaN. Below -100, -inf included, it is 0: beside the softmax's largest term, which is 1, that much is
// nothing, but its products would be subnormal, and an operation with those costs a hundred times more.
DF_INLINE Vec exp2(Vec x) {
    const float smallest = -100.f;
#if defined(__AVX512F__)
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    // 1.5 * 2^23: the sum's low bits are the nearest integer to x - 1/2, which is its floor or one less.
    const Vec shifter = splat(12582912.f);
    const Vec shifted = x - 0.5f + shifter;
    const Vec f = x - (shifted - shifter);
#endif
    Vec p = splat(1.867130166e-3f);
    p = p * f + 9.017029777e-3f;
    p = p * f + 5.579991266e-2f;
    p = p * f + 2.401644439e-1f;
    p = p * f + 6.931512952e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(smallest), _CMP_NLT_UQ);  // NaN too
    return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)x);
#else
    const Vec scaled = (Vec)((WordVec)p + ((WordVec)shifted << 23));  // wraps where x < smallest, which is not kept
    const Vec zero_or_nan = x < smallest ? Vec{} : x;
    return x >= smallest ? scaled : zero_or_nan;
#endif
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
