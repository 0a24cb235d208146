// The mask rule in C++: the port of AttentionMask.allows in dalle_fast/masks.py, which is its only definition.
// tests/test_masks.py compares the two exhaustively.
#pragma once

#include <cstdint>

namespace dalle_fast {

// The order is that of RULES in dalle_fast/masks.py.
enum class Rule : int32_t { causal, row, axial_row, column, conv_flat, conv_clip, conv_torus, conv_corner };

// AttentionMask.encode(): T text positions, an H x W grid, kernel size K, dilation d.
struct Mask {
    Rule rule;
    int32_t T, H, W, K, d;
};

// x in {0, d, ..., steps * d}
inline bool in_steps(int32_t x, int32_t steps, int32_t d) {
    return x >= 0 && x <= steps * d && x % d == 0;
}

inline bool in_steps_either_way(int32_t x, int32_t steps, int32_t d) {
    return in_steps(x, steps, d) || in_steps(-x, steps, d);
}

// x modulo size, for |x| < size
inline int32_t wrap(int32_t x, int32_t size) { return x < 0 ? x + size : x; }

// May image position i see image position j? Needs 0 <= j <= i.
inline bool image_allows(const Mask& m, int32_t i, int32_t j) {
    const int32_t delta = i - j, h = m.K / 2, W = m.W;
    switch (m.rule) {
        case Rule::causal: return true;
        case Rule::row: return delta <= W;
        case Rule::column: return delta % W == 0;
        case Rule::conv_flat: {
            const int32_t steps = delta / m.d, past = steps > h ? steps - h : 0;
            const int32_t dr = (past + W - 1) / W;
            return delta % m.d == 0 && dr <= h && dr * W <= steps + h;
        }
        default: break;
    }
    const int32_t dr = i / W - j / W, dc = i % W - j % W;
    switch (m.rule) {
        case Rule::axial_row: return dr == 0;
        case Rule::conv_clip: return in_steps_either_way(dr, h, m.d) && in_steps_either_way(dc, h, m.d);
        case Rule::conv_torus:
            return (in_steps(wrap(dr, m.H), h, m.d) || in_steps(wrap(-dr, m.H), h, m.d)) &&
                   (in_steps(wrap(dc, W), h, m.d) || in_steps(wrap(-dc, W), h, m.d));
        default: return in_steps(dr, m.K - 1, m.d) && in_steps(dc, m.K - 1, m.d);  // conv_corner
    }
}

// May sequence position q see sequence position k?
inline bool allows(const Mask& m, int32_t q, int32_t k) {
    return k <= q && (k < m.T || image_allows(m, q - m.T, k - m.T));
}

}  // namespace dalle_fast
