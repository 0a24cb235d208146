// Rows of logits on the CPU, for one instruction set: see ../codebook.h for what each kernel computes.
//
// A row of 8,192 floats lies in the first-level cache while a kernel passes over it. Every pass goes by blocks of 64
// codes, the codes of 16 Philox counters; what is left of K behind the last whole block goes through a padded copy.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../gumbel.h"
#include "../philox.h"
#include "codebook.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {
namespace {

constexpr int kVecs = kNoiseBlock / VW;  // vectors in a block
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef uint64_t WideVec __attribute__((vector_size(VW * 4)));

// -- noise ------------------------------------------------------------------------------------------------------------

struct VectorPhilox {
    typedef WideVec Wide;
    static DF_INLINE_MEMBER WideVec low_product(WideVec x, uint32_t m) {
#if defined(__AVX512F__)
        return (WideVec)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
        return (WideVec)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
        return (WideVec)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#else
        return (x & 0xffffffffu) * uint64_t(m);
#endif
    }
};

// All vectors of a block at once, step by step: one vector's logarithms are a chain of some 30 operations that each wait
// for the one before, and a core does not look far enough ahead to find the next vector's meanwhile.
template <class V>
struct Several {
    V part[kVecs];

    template <class F>
    static DF_INLINE_MEMBER Several of(F&& f) {
        Several out;
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) out.part[v] = f(v);
        return out;
    }
    friend DF_INLINE_MEMBER Several operator-(const Several& a) {
        return of([&](int v) DF_INLINE_LAMBDA { return -a.part[v]; });
    }
#define DF_OPERATOR(op)                                                                   \
    friend DF_INLINE_MEMBER Several operator op(const Several& a, const Several& b) {     \
        return of([&](int v) DF_INLINE_LAMBDA { return a.part[v] op b.part[v]; });        \
    }                                                                                     \
    template <class Scalar>                                                               \
    friend DF_INLINE_MEMBER Several operator op(const Several& a, Scalar b) {             \
        return of([&](int v) DF_INLINE_LAMBDA { return a.part[v] op b; });                \
    }
    friend DF_INLINE_MEMBER Several operator-(float a, const Several& b) {
        return of([&](int v) DF_INLINE_LAMBDA { return a - b.part[v]; });
    }
    DF_OPERATOR(+)
    DF_OPERATOR(-)
    DF_OPERATOR(*)
    DF_OPERATOR(&)
    DF_OPERATOR(>>)
#undef DF_OPERATOR
};

struct BlockLanes {
    typedef Several<Vec> Float;
    typedef Several<IntVec> Int;
    typedef Several<WordVec> Word;
    static DF_INLINE_MEMBER Float from_word(const Word& x) {
        return Float::of([&](int v) DF_INLINE_LAMBDA { return __builtin_convertvector(x.part[v], Vec); });
    }
    static DF_INLINE_MEMBER Float from_int(const Int& x) {
        return Float::of([&](int v) DF_INLINE_LAMBDA { return __builtin_convertvector(x.part[v], Vec); });
    }
    static DF_INLINE_MEMBER Int bits_of(const Float& x) {
        return Int::of([&](int v) DF_INLINE_LAMBDA { return (IntVec)x.part[v]; });
    }
    static DF_INLINE_MEMBER Float of_bits(const Int& x) {
        return Float::of([&](int v) DF_INLINE_LAMBDA { return (Vec)x.part[v]; });
    }
    static DF_INLINE_MEMBER Float smaller(const Float& a, const Float& b) {
        return Float::of([&](int v) DF_INLINE_LAMBDA { return a.part[v] < b.part[v] ? a.part[v] : b.part[v]; });
    }
    static DF_INLINE_MEMBER Float where_zero(const Int& x, const Float& a, const Float& b) {
        return Float::of([&](int v) DF_INLINE_LAMBDA { return x.part[v] == 0 ? a.part[v] : b.part[v]; });
    }
};

// The noise of one row.
struct RowNoise {
    uint64_t row;
    uint64_t key_low[kPhiloxRounds], key_high[kPhiloxRounds];  // 64 bits wide, so that a load can broadcast them

    RowNoise(const NoiseRows& n, int64_t r) : row(n.seed_per_row ? 0 : uint64_t(n.first_row + r)) {
        const uint64_t seed = uint64_t(n.seed[n.seed_per_row ? r : 0]);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            key_low[round] = uint32_t(seed) + uint32_t(round) * kPhiloxKeyLow;
            key_high[round] = uint32_t(seed >> 32) + uint32_t(round) * kPhiloxKeyHigh;
        }
    }

    // The noise of the codes [64 * block, 64 * block + 64).
    DF_INLINE_MEMBER void fill(int64_t block, Vec (&noise)[kVecs]) const {
        constexpr int kParts = kNoiseLanes / VW;  // of a block's counters, one lane each
        Several<WordVec> words;
        for (int part = 0; part < kParts; ++part) {
            const uint32_t first = uint32_t(block * kNoiseLanes + part * VW);
            WideVec even;  // every other counter, one in a lane of 64 bits
            for (int lane = 0; lane < VW / 2; ++lane) even[lane] = 2 * lane;
            const WideVec zero{}, low = zero + row, high = zero + (row >> 32);
            even += first;
            PhiloxWords<WideVec> e = {{even, low, high, zero}}, o = {{even + 1, low, high, zero}};
            for (int round = 0; round < kPhiloxRounds; ++round) {
                philox_round<VectorPhilox>(e, key_low[round], key_high[round]);
                philox_round<VectorPhilox>(o, key_low[round], key_high[round]);
            }
            for (int w = 0; w < 4; ++w)
                words.part[w * kParts + part] = (WordVec)((e.word[w] & 0xffffffffu) | (o.word[w] << 32));
        }
        const Several<Vec> all = gumbel_noise<BlockLanes>(words);
        for (int v = 0; v < kVecs; ++v) noise[v] = all.part[v];
    }
};

// -- passes over a row ------------------------------------------------------------------------------------------------

// Calls f(block, valid) for every block of 64 codes; `valid` is 64, or what is left of K.
template <class F>
DF_INLINE void for_each_block(int64_t K, F&& f) {
    const int64_t whole = K / kNoiseBlock;
    for (int64_t block = 0; block < whole; ++block) f(block, kNoiseBlock);
    if (K % kNoiseBlock) f(whole, int(K % kNoiseBlock));
}

template <class T>
DF_INLINE void load_block(const T* from, int valid, float padding, Vec (&to)[kVecs]) {
    if (valid == kNoiseBlock) {
        for (int v = 0; v < kVecs; ++v) to[v] = load_as_float(from + v * VW);
        return;
    }
    float copy[kNoiseBlock];
    for (int x = 0; x < kNoiseBlock; ++x) copy[x] = x < valid ? to_float(from[x]) : padding;
    for (int v = 0; v < kVecs; ++v) to[v] = load(copy + v * VW);
}

template <class T>
DF_INLINE void store_block(const Vec (&from)[kVecs], int valid, T* to) {
    if (valid == kNoiseBlock) {
        for (int v = 0; v < kVecs; ++v) store_from_float(to + v * VW, from[v]);
        return;
    }
    float copy[kNoiseBlock];
    for (int v = 0; v < kVecs; ++v) store(copy + v * VW, from[v]);
    for (int x = 0; x < valid; ++x) from_float(copy[x], to + x);
}

// Logits with their bias, where there is one; padding is -inf.
DF_INLINE void load_logits(const float* bias, const float* row, int64_t block, int valid, Vec (&z)[kVecs]) {
    load_block(row + block * kNoiseBlock, valid, -kInfinity, z);
    if (!bias) return;
    Vec b[kVecs];
    load_block(bias + block * kNoiseBlock, valid, 0, b);
    for (int v = 0; v < kVecs; ++v) z[v] += b[v];
}

DF_INLINE float sum_of(const Vec (&parts)[kVecs]) {
    Vec sum = parts[0];
    for (int v = 1; v < kVecs; ++v) sum += parts[v];
    return horizontal_sum(sum);
}

DF_INLINE float max_of(const Vec (&parts)[kVecs]) {
    Vec most = parts[0];
    for (int v = 1; v < kVecs; ++v) most = max(most, parts[v]);
    return horizontal_max(most);
}

// The largest value and the first code that has it. NaN is passed over.
class Argmax {
public:
    Argmax() {
        for (int v = 0; v < kVecs; ++v) best_[v] = splat(-kInfinity);
        for (int v = 0; v < kVecs; ++v) block_[v] = IntVec{};
    }

    DF_INLINE_MEMBER void see(int64_t block, const Vec (&values)[kVecs]) {
        for (int v = 0; v < kVecs; ++v) {
            const auto more = values[v] > best_[v];
            block_[v] = more ? IntVec{} + int32_t(block) : block_[v];
            best_[v] = more ? values[v] : best_[v];
        }
    }

    float value() const { return max_of(best_); }

    // 0 where none is above -inf.
    int64_t code() const {
        const float most = value();
        if (!(most > -kInfinity)) return 0;
        const IntVec none = IntVec{} + std::numeric_limits<int32_t>::max();
        IntVec lane, blocks = none, places = none;
        for (int x = 0; x < VW; ++x) lane[x] = x;
        for (int v = 0; v < kVecs; ++v) blocks = min(blocks, best_[v] == most ? block_[v] : none);
        const int32_t block = horizontal_min(blocks);
        for (int v = 0; v < kVecs; ++v)
            places = min(places, ((best_[v] == most) & (block_[v] == block)) ? lane + v * VW : none);
        return int64_t(block) * kNoiseBlock + horizontal_min(places);
    }

private:
    Vec best_[kVecs];
    IntVec block_[kVecs];
};

DF_INLINE float max_logit(const float* bias, const float* row, int64_t K) {
    Vec most[kVecs];
    for (int v = 0; v < kVecs; ++v) most[v] = splat(-kInfinity);
    for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
        Vec z[kVecs];
        load_logits(bias, row, block, valid, z);
        for (int v = 0; v < kVecs; ++v) most[v] = max(z[v], most[v]);
    });
    return max_of(most);
}

DF_INLINE float inverse(float tau) {
    const float most = std::numeric_limits<float>::max();
    const float inverse = 1 / tau;
    return inverse > most ? most : inverse;  // the largest logit, 0 after subtraction, stays 0
}

// Turns t into weights exp((t - max) / tau) and returns their sum.
template <class T>
float exponentiate(const float* t, int64_t K, float most, float inverse_tau, T* weights) {
    const float factor = std::fmin(inverse_tau * kLog2e, std::numeric_limits<float>::max());
    Vec sum[kVecs] = {};
    for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
        Vec w[kVecs];
        load_block(t + block * kNoiseBlock, valid, -kInfinity, w);
        for (int v = 0; v < kVecs; ++v) {
            w[v] = exp2((w[v] - most) * factor);
            sum[v] += w[v];
        }
        if (weights) store_block(w, valid, weights + block * kNoiseBlock);
    });
    return sum_of(sum);
}

DF_INLINE void add_noise(const RowNoise& noise, int64_t block, float scale, Vec (&z)[kVecs]) {
    Vec g[kVecs];
    noise.fill(block, g);
    for (int v = 0; v < kVecs; ++v) z[v] += g[v] * scale;
}

// A row of results: where the row of floats is.
template <class T>
DF_INLINE T* row_of(void* rows, int64_t r, int64_t K) {
    return rows ? reinterpret_cast<T*>(static_cast<float*>(rows) + r * K) : nullptr;
}

// -- kernels ----------------------------------------------------------------------------------------------------------

void gumbel_forward(const GumbelForward& a, int64_t begin, int64_t end, float* noisy) {
    const int64_t K = a.x.K;
    for (int64_t r = begin; r < end; ++r) {
        const float* logits = a.x.logits + r * K;
        const RowNoise noise(a.noise, r);
        const float most = max_logit(a.x.bias, logits, K);
        Vec sum[kVecs] = {}, weighted[kVecs] = {};
        Argmax argmax;
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec z[kVecs];
            load_logits(a.x.bias, logits, block, valid, z);
            for (int v = 0; v < kVecs; ++v) {
                // -inf has the weight 0, and 0 * -inf must not become NaN.
                const Vec below = max(splat(-88.f), z[v] - most), e = exp2(below * kLog2e);
                sum[v] += e;
                weighted[v] += e * below;
            }
            add_noise(noise, block, 1, z);
            argmax.see(block, z);
            store_block(z, valid, noisy + block * kNoiseBlock);
        });
        const double total = sum_of(sum);
        a.kl[r] = float(sum_of(weighted) / total - std::log(total) + std::log(double(K)));
        a.codes[r] = argmax.code();
        const float most_noisy = argmax.value();
        const float sum_noisy = exponentiate(noisy, K, most_noisy, inverse(*a.tau), row_of<float>(a.weights, r, K));
        a.stats[r] = {most, float(total), most_noisy, sum_noisy};
    }
}

template <class T>
void gumbel_backward_rows(const GumbelBackward& a, int64_t begin, int64_t end, float* weights) {
    const int64_t K = a.x.K;
    const float inverse_tau = inverse(*a.tau);
    const float factor = std::fmin(inverse_tau * kLog2e, std::numeric_limits<float>::max());
    for (int64_t r = begin; r < end; ++r) {
        const float* logits = a.x.logits + r * K;
        const float* grad_weights = static_cast<const float*>(a.grad_weights) + r * K;
        float* grad_logits = row_of<float>(a.grad_logits, r, K);
        const RowNoise noise(a.noise, r);
        const GumbelStats stats = a.stats[r];
        const float inverse_sum = 1 / stats.sum_noisy;
        const float grad_kl = a.grad_kl ? a.grad_kl[r] / stats.sum : 0;
        const float entropy = float(std::log(double(K)) - std::log(double(stats.sum)) - double(a.kl[r]));
        Vec dots[kVecs] = {};
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec z[kVecs], grad[kVecs], of_kl[kVecs];
            load_logits(a.x.bias, logits, block, valid, z);
            load_block(grad_weights + block * kNoiseBlock, valid, 0, grad);
            for (int v = 0; v < kVecs; ++v) {
                const Vec below = max(splat(-88.f), z[v] - stats.max_logit);
                of_kl[v] = grad_kl * exp2(below * kLog2e) * (below + entropy);
            }
            add_noise(noise, block, 1, z);
            for (int v = 0; v < kVecs; ++v) {
                z[v] = exp2((z[v] - stats.max_noisy) * factor) * inverse_sum;
                dots[v] += z[v] * grad[v];
            }
            store_block(z, valid, weights + block * kNoiseBlock);
            store_block(of_kl, valid, grad_logits + block * kNoiseBlock);
        });
        const float dot = sum_of(dots);
        // They take the place of floats, and are no wider: none reaches floats that are still to be read.
        T *results = row_of<T>(a.grad_logits, r, K), *kept = row_of<T>(a.weights, r, K);
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec y[kVecs], grad[kVecs], of_kl[kVecs];
            load_block(weights + block * kNoiseBlock, valid, 0, y);
            load_block(grad_weights + block * kNoiseBlock, valid, 0, grad);
            load_block(grad_logits + block * kNoiseBlock, valid, 0, of_kl);
            for (int v = 0; v < kVecs; ++v) of_kl[v] += y[v] * (grad[v] - dot) * inverse_tau;
            store_block(of_kl, valid, results + block * kNoiseBlock);
            if (kept) store_block(y, valid, kept + block * kNoiseBlock);
        });
    }
}

void gumbel_backward(const GumbelBackward& a, int64_t begin, int64_t end, float* scratch) {
    with_type(a.dtype, [&](auto zero) { gumbel_backward_rows<decltype(zero)>(a, begin, end, scratch); });
}

void best_codes(const SampleRows& a, const LogitTile& tile, BestCode* of_rows) {
    const float temperature = a.temperature ? *a.temperature : 0;
    const int64_t first = tile.of.column, count = tile.of.end_column - first, first_block = first / kNoiseBlock;
    const float* bias = a.x.bias ? a.x.bias + first : nullptr;
    for (int64_t r = tile.of.row; r < tile.of.end_row; ++r) {
        const float* logits = tile.logits + (r - tile.of.row) * tile.stride;
        Argmax argmax;
        if (temperature == 0) {
            for_each_block(count, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
                Vec z[kVecs];
                load_logits(bias, logits, block, valid, z);
                argmax.see(block, z);
            });
        } else {
            const RowNoise noise(a.noise, r);
            for_each_block(count, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
                Vec z[kVecs];
                load_logits(bias, logits, block, valid, z);
                add_noise(noise, first_block + block, temperature, z);
                argmax.see(block, z);
            });
        }
        *of_rows++ = {argmax.value(), first + argmax.code()};
    }
}

// Of rows that count. The tile that has a row's target writes its logit to a.loss.
void exp_sums(const CrossEntropyRows& a, const LogitTile& tile, ExpSum* of_rows) {
    const int64_t first = tile.of.column, count = tile.of.end_column - first;
    const float* bias = a.x.bias ? a.x.bias + first : nullptr;
    for (int64_t r = tile.of.row; r < tile.of.end_row; ++r, ++of_rows) {
        if (a.target[r] == a.ignore_index) continue;
        const float* logits = tile.logits + (r - tile.of.row) * tile.stride;
        // Not -inf: where all codes of the tile are forbidden, their weights are 0 and not NaN.
        const float most = std::fmax(max_logit(bias, logits, count), std::numeric_limits<float>::lowest());
        Vec sums[kVecs] = {};
        for_each_block(count, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec z[kVecs];
            load_logits(bias, logits, block, valid, z);
            for (int v = 0; v < kVecs; ++v) sums[v] += exp2((z[v] - most) * kLog2e);
        });
        *of_rows = {most, sum_of(sums)};
        const int64_t target = a.target[r] - first;
        if (0 <= target && target < count) a.loss[r] = logits[target] + (bias ? bias[target] : 0);
    }
}

// With gradients, which replace the logits.
template <class T>
void cross_entropy_rows(const CrossEntropyRows& a, int64_t begin, int64_t end, float* weights) {
    const int64_t K = a.x.K;
    for (int64_t r = begin; r < end; ++r) {
        const float* logits = a.x.logits + r * K;
        T* grad_logits = row_of<T>(a.grad_logits, r, K);
        const int64_t target = a.target[r];
        if (target == a.ignore_index) {
            a.loss[r] = 0;
            std::memset(grad_logits, 0, size_t(K) * sizeof(T));
            continue;
        }
        const float most = max_logit(a.x.bias, logits, K);
        const float of_target = logits[target] + (a.x.bias ? a.x.bias[target] : 0);
        Vec sums[kVecs] = {};
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec z[kVecs];
            load_logits(a.x.bias, logits, block, valid, z);
            for (int v = 0; v < kVecs; ++v) {
                z[v] = exp2((z[v] - most) * kLog2e);
                sums[v] += z[v];
            }
            store_block(z, valid, weights + block * kNoiseBlock);
        });
        const double sum = sum_of(sums);
        a.loss[r] = float(std::log(sum) - double(of_target - most));
        const float weight = a.row_weight[a.weight_per_row ? r : 0];
        const float factor = float(weight / sum);
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec e[kVecs];
            load_block(weights + block * kNoiseBlock, valid, 0, e);
            for (int v = 0; v < kVecs; ++v) e[v] *= factor;
            store_block(e, valid, grad_logits + block * kNoiseBlock);
        });
        from_float(weights[target] * factor - weight, grad_logits + target);
    }
}

void cross_entropy(const CrossEntropyRows& a, int64_t begin, int64_t end, float* scratch) {
    with_type(a.dtype, [&](auto zero) { cross_entropy_rows<decltype(zero)>(a, begin, end, scratch); });
}

template <class T>
void gumbel_softmax_rows(const GumbelSoftmaxRows& a, int64_t begin, int64_t end, float* noisy) {
    const int64_t K = a.K;
    for (int64_t r = begin; r < end; ++r) {
        const T* logits = static_cast<const T*>(a.logits) + r * K;
        T* out = static_cast<T*>(a.out) + r * K;
        const RowNoise noise(a.noise, r);
        Argmax argmax;
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec z[kVecs];
            load_block(logits + block * kNoiseBlock, valid, -kInfinity, z);
            add_noise(noise, block, 1, z);
            argmax.see(block, z);
            store_block(z, valid, noisy + block * kNoiseBlock);
        });
        if (a.codes) a.codes[r] = argmax.code();
        const float sum = exponentiate(noisy, K, argmax.value(), inverse(a.tau), noisy);
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec y[kVecs];
            load_block(noisy + block * kNoiseBlock, valid, 0, y);
            for (int v = 0; v < kVecs; ++v) y[v] /= sum;
            store_block(y, valid, out + block * kNoiseBlock);
        });
    }
}

void gumbel_softmax(const GumbelSoftmaxRows& a, int64_t begin, int64_t end, float* scratch) {
    with_type(a.dtype, [&](auto zero) { gumbel_softmax_rows<decltype(zero)>(a, begin, end, scratch); });
}

// -- what may be drawn --------------------------------------------------------------------------------------------------

// Floats in their order as integers in theirs, -0 right before 0, and back.
int32_t order_of(float x) {
    const int32_t bits = int32_t(float_to_bits(x));
    return bits ^ (bits >> 31 & 0x7fffffff);
}
float in_order(int32_t n) { return bits_to_float(uint32_t(n ^ (n >> 31 & 0x7fffffff))); }

// The largest number of which enough(number) holds, as it does of -inf and of all below one of which it does, and not
// beyond `most`. A number is halved some thirty times, where sorting a row would move it more often.
template <class Enough>
DF_INLINE float largest(float most, Enough&& enough) {
    int64_t holds = order_of(-kInfinity), does_not = int64_t(order_of(most)) + 1;
    while (does_not - holds > 1) {
        const int64_t middle = holds + (does_not - holds) / 2;
        (enough(in_order(int32_t(middle))) ? holds : does_not) = middle;
    }
    return in_order(int32_t(holds));
}

// Sums of[x] over the codes whose z is at least `least`. Fewer terms never have a larger sum: they are added in order.
DF_INLINE float sum_from(float least, const float* z, const float* of, int64_t K) {
    Vec sums[kVecs] = {};
    for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
        Vec x[kVecs], y[kVecs];
        load_block(z + block * kNoiseBlock, valid, -kInfinity, x);
        load_block(of + block * kNoiseBlock, valid, 0, y);
        for (int v = 0; v < kVecs; ++v) sums[v] += x[v] >= least ? y[v] : Vec{};
    });
    return sum_of(sums);
}

DF_INLINE int64_t count_from(float least, const float* z, int64_t K) {
    IntVec counts[kVecs] = {};
    for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
        Vec x[kVecs];
        load_block(z + block * kNoiseBlock, valid, std::numeric_limits<float>::quiet_NaN(), x);
        for (int v = 0; v < kVecs; ++v) counts[v] -= x[v] >= least;
    });
    int64_t count = 0;
    for (int v = 0; v < kVecs; ++v)
        for (int x = 0; x < VW; ++x) count += counts[v][x];
    return count;
}

// Forbids what is below `least`, and of those that equal it the last ones, so that at most `count` stay.
void forbid(float* z, int64_t K, float least, int64_t count) {
    int64_t surplus = count_from(least, z, K) - count;
    for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
        Vec x[kVecs];
        load_block(z + block * kNoiseBlock, valid, -kInfinity, x);
        for (int v = 0; v < kVecs; ++v) x[v] = x[v] >= least ? x[v] : splat(-kInfinity);
        store_block(x, valid, z + block * kNoiseBlock);
    });
    for (int64_t code = K; surplus > 0 && code-- > 0;) {
        if (z[code] != least) continue;
        z[code] = -kInfinity;
        --surplus;
    }
}

void truncate(const TruncatedRows& a, int64_t begin, int64_t end, float* weights) {
    const int64_t K = a.K;
    for (int64_t r = begin; r < end; ++r) {
        float* z = a.logits + r * K;
        const float most = max_logit(nullptr, z, K);
        if (!(std::fabs(most) <= std::numeric_limits<float>::max())) continue;  // all forbidden, infinite or NaN
        if (a.top_k < K)
            forbid(z, K, largest(most, [&](float least) { return count_from(least, z, K) >= a.top_k; }), a.top_k);
        for_each_block(K, [&](int64_t block, int valid) DF_INLINE_LAMBDA {
            Vec x[kVecs];
            load_block(z + block * kNoiseBlock, valid, -kInfinity, x);
            for (int v = 0; v < kVecs; ++v)  // NaN is forbidden: its weight would be all of the sum
                x[v] = x[v] > -kInfinity ? (x[v] - most) / a.temperature : splat(-kInfinity);
            store_block(x, valid, z + block * kNoiseBlock);
        });
        if (a.top_p >= 1) continue;
        const float wanted = a.top_p * exponentiate(z, K, 0, 1, weights);
        const float least = largest(0, [&](float x) { return sum_from(x, z, weights, K) >= wanted; });
        // Of equal ones no more than are needed beside those above.
        const float next = in_order(order_of(least) + 1), above = sum_from(next, z, weights, K);
        const int64_t count = count_from(next, z, K), equal = count_from(least, z, K) - count;
        const float share = (wanted - above) / (sum_from(least, z, weights, K) - above);
        forbid(z, K, least, count + std::max<int64_t>(1, int64_t(std::ceil(share * float(equal)))));
    }
}

}  // namespace

extern const CodebookKernels codebook_kernels;
const CodebookKernels codebook_kernels = {gumbel_forward, gumbel_backward, cross_entropy, gumbel_softmax, truncate,
                                          best_codes, exp_sums};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
