// Cuts attention into tasks and runs them on threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "parallel.h"

namespace dalle_fast {

// Blocks of a head that nobody has begun. Their thread takes them from the front.
struct BlocksLeft {
    void set(uint32_t begin, uint32_t end) { ends_ = pack(begin, end); }
    int32_t count() const { return count(ends_); }
    bool take(uint32_t begin, uint32_t end) {
        uint64_t seen = ends_;
        do {
            if (begin >= seen >> 32) return false;
        } while (!ends_.compare_exchange_weak(seen, pack(end, seen >> 32)));
        return true;
    }
    // The rear half, for another thread. False where there are fewer than `fewest`.
    bool halve(int32_t fewest, int32_t& begin, int32_t& end) {
        uint64_t seen = ends_;
        do {
            if (count(seen) < fewest) return false;
            end = int32_t(seen >> 32);
            begin = end - count(seen) / 2;
        } while (!ends_.compare_exchange_weak(seen, pack(uint32_t(seen), uint32_t(begin))));
        return true;
    }

private:
    static uint64_t pack(uint64_t begin, uint64_t end) { return begin | end << 32; }
    static int32_t count(uint64_t ends) { return int32_t(ends >> 32) - int32_t(uint32_t(ends)); }

    std::atomic<uint64_t> ends_{0};  // where they begin, and in the upper half where they end
};

bool take_blocks(const AttentionTask& task, int32_t begin, int32_t end) { return task.left->take(begin, end); }

namespace {

constexpr int64_t kSerialWork = 1 << 14;  // tiles x head size: some 20 microseconds of one core
constexpr int32_t kWorthHalving = 16;     // blocks: whoever takes some over packs the text's keys anew

// Hands out heads and, when there are none left, half of what another thread has left of its head: however slow one is,
// all end together. Blocks do not depend on each other, so neither do results on who made them.
class ForwardTasks {
public:
    ForwardTasks(const AttentionArgs& a, int threads) : a_(a), shares_(size_t(threads)) {}

    // What a thread does next. False where nothing is worth it.
    bool next(int thread, AttentionTask& task) {
        const std::lock_guard<std::mutex> lock(mutex_);  // so that a share's head is that of its blocks
        Share& mine = shares_[size_t(thread)];
        const int64_t heads = a_.B * a_.H, next = next_ + int64_t(shares_.size());
        int32_t begin = 0, end = a_.layout.num_blocks;
        task = AttentionTask{};
        if (next_ < heads) {
            mine.head = next_++;
            task.next_batch = next / a_.H;
            task.next_head = next < heads ? next % a_.H : -1;
        } else {
            Share& largest = *std::max_element(shares_.begin(), shares_.end(), [](const Share& x, const Share& y) {
                return x.left.count() < y.left.count();
            });
            if (!largest.left.halve(kWorthHalving, begin, end)) return false;
            mine.head = largest.head;
        }
        mine.left.set(uint32_t(begin), uint32_t(end));
        task.batch = mine.head / a_.H;
        task.head = mine.head % a_.H;
        task.block_begin = begin;
        task.block_end = a_.layout.num_blocks;
        task.left = &mine.left;
        return true;
    }

private:
    struct alignas(64) Share {  // a thread's
        BlocksLeft left;
        int64_t head = 0;
    };

    const AttentionArgs& a_;
    std::mutex mutex_;
    std::vector<Share> shares_;
    int64_t next_ = 0;  // the next head
};

// Waking threads costs more than a few tiles do.
int threads_for(const AttentionArgs& a, int threads) {
    return a.B * a.H * a.layout.num_tiles * a.D < kSerialWork ? 1 : threads;
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
    if (a.B * a.H == 0 || a.layout.seq_len == 0) return;
    const int64_t most = a.B * a.H * std::max(1, 2 * a.layout.num_blocks / kWorthHalving);
    threads = int(std::min<int64_t>(threads_for(a, threads), most));
    ForwardTasks tasks(a, threads);
    on_threads(threads, kernels.forward_scratch(a), [&](int thread, char* scratch) {
        for (AttentionTask task; tasks.next(thread, task);) kernels.forward(a, task, scratch);
    });
}

void attention_backward(const AttentionKernels& kernels, const AttentionArgs& a, int threads) {
    threads = threads_for(a, threads);
    AttentionTask whole{0, 0, 0, a.layout.num_blocks, 0, a.layout.num_panels, true, true};
    const int64_t heads = a.B * a.H;
    if (heads == 0 || a.layout.seq_len == 0) return;
    std::vector<AttentionTask> parts_of_head;
    if (heads >= threads) {
        parts_of_head.push_back(whole);
    } else {  // Each gradient is made by one task alone, at the price of computing the scores twice.
        const int32_t parts = int32_t((2 * threads + heads - 1) / heads);  // so that all have enough to share
        whole.for_query = false;
        append_parts(parts_of_head, whole, &AttentionTask::panel_begin, &AttentionTask::panel_end, 2 * parts);
        whole.for_query = true;
        whole.for_key = false;
        append_parts(parts_of_head, whole, &AttentionTask::block_begin, &AttentionTask::block_end, parts);
    }
    const int64_t parts = int64_t(parts_of_head.size());
    for_each(heads * parts, threads, kernels.backward_scratch(a), [&](int64_t x, char* scratch) {
        AttentionTask task = parts_of_head[size_t(x % parts)];
        task.batch = x / parts / a.H;
        task.head = x / parts % a.H;
        kernels.backward(a, task, scratch);
    });
}

}  // namespace dalle_fast
