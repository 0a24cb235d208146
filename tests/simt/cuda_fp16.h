// float16 for the host, as far as csrc/cuda/*.cu needs it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(fraction + 1024), exponent - 25)
                                      : std::ldexp(float(fraction), -24);
    return x.bits & 0x8000 ? -size : size;
}

// To the nearest, and of two the even one.
inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return {0x7fff};
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | int(std::nearbyint(std::ldexp(size, 24))))};
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // from 1/2 to 1: 11 digits stay
    return {uint16_t(sign | (int(std::nearbyint(std::ldexp(fraction, 11))) - 1024 + (exponent + 14) * 1024))};
}
