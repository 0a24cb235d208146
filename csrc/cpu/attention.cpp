// Cuts attention into tasks and runs them on threads.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSerialWork = 1 << 14;  // tiles x head size: some 20 microseconds of one core

using Kernel = void (*)(const AttentionArgs&, const AttentionTask&, char*);

// The tasks of each of the first heads, then those of each of the last ones.
struct Tasks {
    int64_t num_first, num_last;
    std::vector<AttentionTask> of_first, of_last;

    int64_t count() const { return num_first * int64_t(of_first.size()) + num_last * int64_t(of_last.size()); }
    AttentionTask at(int64_t x, int64_t H) const {
        const int64_t behind_first = x - num_first * int64_t(of_first.size());
        const bool is_last = behind_first >= 0;
        const std::vector<AttentionTask>& tasks = is_last ? of_last : of_first;
        const int64_t y = is_last ? behind_first : x, parts = int64_t(tasks.size());
        const int64_t head = y / parts + (is_last ? num_first : 0);
        AttentionTask task = tasks[size_t(y % parts)];
        task.batch = head / H;
        task.head = head % H;
        return task;
    }
};

void run(Kernel kernel, const AttentionArgs& a, const Tasks& tasks, size_t scratch_bytes, int threads) {
    const int64_t count = tasks.count();
    if (count == 0 || a.layout.seq_len == 0) return;
    for_each(count, threads, scratch_bytes, [&](int64_t x, void* scratch) {
        AttentionTask task = tasks.at(x, a.H);
        if (x + threads < count) {
            const AttentionTask next = tasks.at(x + threads, a.H);
            task.next_batch = next.batch;
            task.next_head = next.head;
            task.next_block = next.block_begin;
        }
        kernel(a, task, static_cast<char*>(scratch));
    });
}

// Waking threads costs more than a few tiles do.
int threads_for(const AttentionArgs& a, int threads) {
    return a.B * a.H * a.layout.num_tiles * a.D < kSerialWork ? 1 : threads;
}

// Into how many parts to cut each of fewer heads than threads, so that all have enough to share.
int32_t parts_of_few(int64_t heads, int threads) { return heads == 0 ? 0 : int32_t((2 * threads + heads - 1) / heads); }

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
    threads = threads_for(a, threads);
    const AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, false, false};
    // The heads that are left when all threads have had as many are cut. No others: each part packs the text's keys anew.
    const int64_t heads = a.B * a.H, left = heads % threads;
    Tasks tasks{heads - left, left, {whole}, {}};
    append_parts(tasks.of_last, whole, &AttentionTask::block_begin, &AttentionTask::block_end, parts_of_few(left, threads));
    run(kernels.forward, a, tasks, kernels.forward_scratch(a), threads);
}

void attention_backward(const AttentionKernels& kernels, const AttentionArgs& a, int threads) {
    threads = threads_for(a, threads);
    AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, true, true};
    const int64_t heads = a.B * a.H;
    const int32_t parts = parts_of_few(heads, threads);
    Tasks tasks{heads, 0, {}, {}};
    if (heads >= threads) {
        tasks.of_first.push_back(whole);
    } else {  // Each gradient is made by one task alone, at the price of computing the scores twice.
        whole.for_query = false;
        append_parts(tasks.of_first, whole, &AttentionTask::panel_begin, &AttentionTask::panel_end, 2 * parts);
        whole.for_query = true;
        whole.for_key = false;
        append_parts(tasks.of_first, whole, &AttentionTask::block_begin, &AttentionTask::block_end, parts);
    }
    run(kernels.backward, a, tasks, kernels.backward_scratch(a), threads);
}

}  // namespace dalle_fast
