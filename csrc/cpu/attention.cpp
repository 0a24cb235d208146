// Cuts attention into tasks and runs them on threads.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 14;  // tiles x head size: some 20 microseconds of one core

using Kernel = void (*)(const AttentionArgs&, const AttentionTask&, char*);

void run(Kernel kernel, const AttentionArgs& a, const std::vector<AttentionTask>& per_head, size_t scratch_bytes,
         int threads) {
    const int64_t count = a.B * a.H * int64_t(per_head.size());
    if (count == 0 || a.layout.seq_len == 0) return;
    // Waking threads costs more than a few tiles do.
    if (a.B * a.H * a.layout.num_tiles * a.D < kSerialWork) threads = 1;
    for_each(count, threads, scratch_bytes, [&](int64_t x, void* scratch) {
        const int64_t parts = int64_t(per_head.size()), head = x / parts, next = x + threads;
        AttentionTask task = per_head[size_t(x % parts)];
        task.batch = head / a.H;
        task.head = head % a.H;
        if (next < count && next % parts == x % parts) {
            task.next_batch = next / parts / a.H;
            task.next_head = next / parts % a.H;
        }
        kernel(a, task, static_cast<char*>(scratch));
    });
}

// Into how many parts to cut a head, so that threads have enough to share.
int32_t parts_of_head(const AttentionArgs& a, int threads) {
    const int64_t heads = std::max<int64_t>(1, a.B * a.H);
    return heads >= threads ? 1 : int32_t((2 * threads + heads - 1) / heads);
}

void append_parts(std::vector<AttentionTask>& tasks, AttentionTask whole, int32_t AttentionTask::*begin,
                  int32_t AttentionTask::*end, int32_t parts) {
    const int64_t size = whole.*end;
    for (int64_t part = 0; part < parts; ++part) {
        AttentionTask task = whole;
        task.*begin = int32_t(size * part / parts);
        task.*end = int32_t(size * (part + 1) / parts);
        if (task.*begin < task.*end) tasks.push_back(task);
    }
}

}  // namespace

void attention_forward(const AttentionKernels& kernels, const AttentionArgs& a, int threads) {
    const AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, false, false};
    std::vector<AttentionTask> tasks;
    append_parts(tasks, whole, &AttentionTask::block_begin, &AttentionTask::block_end, parts_of_head(a, threads));
    run(kernels.forward, a, tasks, kernels.forward_scratch(a), threads);
}

void attention_backward(const AttentionKernels& kernels, const AttentionArgs& a, int threads) {
    AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, true, true};
    std::vector<AttentionTask> tasks;
    const int32_t parts = parts_of_head(a, threads);
    if (parts == 1) {
        tasks.push_back(whole);
    } else {  // Each gradient is made by one task alone, at the price of computing the scores twice.
        whole.for_query = false;
        append_parts(tasks, whole, &AttentionTask::panel_begin, &AttentionTask::panel_end, 2 * parts);
        whole.for_query = true;
        whole.for_key = false;
        append_parts(tasks, whole, &AttentionTask::block_begin, &AttentionTask::block_end, parts);
    }
    run(kernels.backward, a, tasks, kernels.backward_scratch(a), threads);
}

}  // namespace dalle_fast
