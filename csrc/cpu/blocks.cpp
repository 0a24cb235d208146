// One token through all blocks: a block's phases one after another, each shared between threads.
#include "blocks.h"

#include <vector>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialNumbers = 1 << 14;  // that a phase reads once: some 10 microseconds of one core

struct Step {
    const BlocksKernels& kernels;
    const LinearKernels& linear_kernels;
    const DecodeKernels& decode_kernels;
    const BlocksArgs& a;
    const int threads;
    const int64_t heads = a.H * a.D;
    std::vector<float> x = std::vector<float>(a.x, a.x + a.R * a.W);  // (R, W): what the residual blocks add up to
    std::vector<float> inner = std::vector<float>(size_t(a.R * a.W)), update = inner;
    std::vector<float> qkv = std::vector<float>(size_t(a.R * 3 * heads)), inside = std::vector<float>(size_t(a.R * a.F));
    std::vector<float> attended = std::vector<float>(size_t(a.R * heads));
    std::vector<float> query = attended, out = attended;  // in the caches' dtype, where that is not float32

    void run() {
        const float* last = nullptr;
        for (int64_t block = 0; block < a.num_blocks; ++block) {
            const Block& b = a.blocks[block];
            add_norm(b.attention_norm, last, inner.data());
            linear(b.qkv, inner, 3 * heads, a.W, qkv, false);
            attend(b);
            linear(b.out, attended, a.W, heads, update, false);
            add_norm(b.mlp_norm, update.data(), inner.data());
            linear(b.up, inner, a.F, a.W, inside, true);
            linear(b.down, inside, a.W, a.F, update, false);
            last = update.data();
        }
        add_norm(a.norm, last, a.out);
    }

    template <class Task>
    void for_samples(int64_t numbers, Task&& task) {
        for_each(a.R, a.R * numbers < kSerialNumbers ? 1 : threads, 0, [&](int64_t sample, void*) { task(sample); });
    }

    void add_norm(const NormWeights& weights, const float* added, float* normalized) {
        const AddNormArgs args{a.W, a.dtype, weights, x.data(), added, normalized};
        for_samples(a.W, [&](int64_t sample) { kernels.add_norm(args, sample); });
    }

    void linear(const LinearWeights& weights, const std::vector<float>& from, int64_t N, int64_t K,
                std::vector<float>& to, bool gelu) {
        LinearArgs args{};
        args.R = a.R;
        args.N = N;
        args.K = args.stride_weight = K;
        args.x = from.data();
        args.dtype = a.dtype;
        args.weight = weights.weight;
        args.bias = weights.bias;
        args.out = to.data();
        args.gelu = gelu;
        dalle_fast::linear(linear_kernels, args, threads);
    }

    // The packed projection's keys and values into the caches, and what its queries see there.
    void attend(const Block& b) {
        const bool copies = a.dtype != DType::float32;
        const auto packed = [&](std::vector<float>& of, int64_t stride) {
            return Strided{reinterpret_cast<char*>(of.data()), stride, a.D, 0, 1};
        };
        DecodeArgs args{};
        args.B = a.R;
        args.P = a.P;
        args.H = a.H;
        args.T = a.T;
        args.D = a.D;
        args.scale = a.scale;
        args.dtype = a.dtype;
        args.text_lengths = a.text_lengths;
        args.slots = b.slots;
        args.num_slots = b.num_slots;
        args.text_key = b.text_key;
        args.text_value = b.text_value;
        args.image_key = b.image_key;
        args.image_value = b.image_value;
        args.query = copies ? packed(query, heads) : packed(qkv, 3 * heads);
        args.out = packed(copies ? out : attended, heads);
        for_samples(3 * heads, [&](int64_t sample) {
            const float* q = qkv.data() + sample * 3 * heads;
            if (copies) kernels.store_heads(a.dtype, q, a.H, a.D, args.query, sample, 0);
            kernels.store_heads(a.dtype, q + heads, a.H, a.D, b.image_key, sample, b.slot);
            kernels.store_heads(a.dtype, q + 2 * heads, a.H, a.D, b.image_value, sample, b.slot);
        });
        attention_decode(decode_kernels, args, threads);
        if (!copies) return;
        for_samples(heads, [&](int64_t sample) {
            kernels.load_heads(a.dtype, args.out, sample, 0, a.H, a.D, attended.data() + sample * heads);
        });
    }
};

}  // namespace

void blocks_step(const BlocksKernels& kernels, const LinearKernels& linear_kernels, const DecodeKernels& decode_kernels,
                 const BlocksArgs& a, int threads) {
    if (a.R > 0) Step{kernels, linear_kernels, decode_kernels, a, threads}.run();
}

}  // namespace dalle_fast
