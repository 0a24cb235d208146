// Gumbel noise from 32 random bits: g = -log(-log1p(-u)), finite for every word, correct to a few units in the last
// place. One text for scalars on host and device and for vectors on the CPU.
//
// u is the same number everywhere. In the rest the compiler may fuse products with sums: implementations differ by
// rounding.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace dalle_fast {

// What the text below needs of a lane type: its floats, signed and unsigned integers with their arithmetic, and how they
// become each other.
struct ScalarLanes {
    typedef float Float;
    typedef int32_t Int;
    typedef uint32_t Word;
    DALLE_FAST_INLINE float from_word(uint32_t x) { return float(x); }
    DALLE_FAST_INLINE float from_int(int32_t x) { return float(x); }
    DALLE_FAST_INLINE float smaller(float a, float b) { return a < b ? a : b; }
    DALLE_FAST_INLINE float where_zero(int32_t x, float a, float b) { return x == 0 ? a : b; }
    DALLE_FAST_INLINE int32_t bits_of(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }
    DALLE_FAST_INLINE float of_bits(int32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

// A positive normal number is 2^(exponent / 2^23) * (1 + fraction), with 1 + fraction from sqrt(1/2) to sqrt(2): the
// exponent stays where it is in the number's bits.
template <class Lanes>
struct Split {
    typename Lanes::Int exponent;
    typename Lanes::Float fraction;
};

template <class Lanes>
DALLE_FAST_INLINE Split<Lanes> split(typename Lanes::Float x) {
    const typename Lanes::Int bits = Lanes::bits_of(x), exponent = (bits - 0x3f3504f3) & ~0x7fffff;  // sqrt(1/2)
    return {exponent, Lanes::of_bits(bits - exponent) - 1.0f};
}

// log(1 + f) = f - f^2 / 2 + f^3 P(f), P of degree 8 with the coefficients of Cephes' logf, and the exponent times ln 2,
// which is added in two parts, the larger of them exact.
template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float log_of(const Split<Lanes>& x) {
    typedef typename Lanes::Float Float;
    const Float f = x.fraction, exponent = Lanes::from_int(x.exponent);
    Float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float larger = 0.693359375f * 0x1p-23f, smaller = -2.12194440e-4f * 0x1p-23f;
    return exponent * larger + (f + (exponent * smaller + (p * f - 0.5f) * (f * f)));
}

template <class Lanes>
DALLE_FAST_INLINE typename Lanes::Float gumbel_noise(typename Lanes::Word word) {
    typedef typename Lanes::Float Float;
    // The middle of the word's interval, so never 0. The largest ones would be rounded to 1.
    const Float middle = Lanes::from_word(word) * 0x1p-32f + 0x1p-33f, u = Lanes::smaller(middle, Float() + (1.0f - 0x1p-24f));
    Split<Lanes> parts = split<Lanes>(1.0f - u);
    // For small u the difference has lost digits of u, but there the fraction is -u.
    parts.fraction = Lanes::where_zero(parts.exponent, -u, parts.fraction);
    return -log_of<Lanes>(split<Lanes>(-log_of<Lanes>(parts)));
}

}  // namespace dalle_fast
