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

// Into how many parts to cut each head, so that threads have enough to share.
int32_t parts_of_head(const AttentionArgs& a, int threads) {
    const int64_t heads = std::max<int64_t>(1, a.B * a.H);
    return heads >= threads ? 1 : int32_t((2 * threads + heads - 1) / heads);
}

// Forward: cut, the last heads let all threads end together, which do not begin at once, nor are equally fast. But each part
// packs the text's keys anew: measured, four parts take a fifth longer than a head in one.
int32_t parts_of_last_heads(int64_t heads, int threads) { return heads % threads ? 4 : heads >= 4 * threads ? 2 : 1; }

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
    const int64_t heads = a.B * a.H, num_cut = threads > 1 ? std::min<int64_t>(heads, threads) : 0;
    Tasks tasks{heads - num_cut, num_cut, {whole}, {}};
    append_parts(tasks.of_last, whole, &AttentionTask::block_begin, &AttentionTask::block_end,
                 std::max(parts_of_last_heads(heads, threads), parts_of_head(a, threads)));
    run(kernels.forward, a, tasks, kernels.forward_scratch(a), threads);
}

void attention_backward(const AttentionKernels& kernels, const AttentionArgs& a, int threads) {
    threads = threads_for(a, threads);
    AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, true, true};
    Tasks tasks{a.B * a.H, 0, {}, {}};
    const int32_t parts = parts_of_head(a, threads);
    if (parts == 1) {
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
