// As much of CUDA as csrc/cuda/*.cu needs to be compiled for the host by an ordinary C++ compiler.
//
// Blocks run one after another. The threads of a block are fibers, each of which runs until it waits for others; a
// kernel without barriers is a plain loop. Of those that waited one warp goes on until it can go no further, then the
// next one, and the next time in the opposite order: whoever reads what another warp has yet to write, or writes what
// another has yet to read, gives a wrong result. Dynamic shared memory has exactly the size of the launch and begins as
// NaN. A block whose threads wait for others that have left or wait elsewhere is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#define __global__ static
#define __device__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DALLE_FAST_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(simt::dynamic_shared)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t e) {
    return e == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

namespace simt {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxShared = 48 << 10;  // what a launch has without asking for more

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "simt: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
    std::abort();
}

// Threads that meet: a block, or the lanes of a warp, each of which leaves a word there. There are two places for these:
// whoever writes to one again has since met everybody who read it.
struct Meeting {
    unsigned size = 0, arrived = 0, times = 0;
    uint32_t words[2][kWarp];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* fake_stack = nullptr;  // the sanitizer's
    unsigned thread = 0;
    bool ended = false;
    const Meeting* waits_for = nullptr;
    unsigned times = 0;  // that the meeting had taken place when this began to wait
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;

inline std::function<void()> thread_body;
inline unsigned threads_begun;
inline Meeting block_meeting;
inline std::vector<Meeting> warp_meetings;
inline char* dynamic_shared;

inline void pause() {
    Fiber& self = *running;
    __sanitizer_start_switch_fiber(&self.fake_stack, scheduler_stack, scheduler_stack_bytes);
    swapcontext(&self.context, &scheduler);
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

inline void resume(Fiber& fiber) {
    running = &fiber;
    fiber.waits_for = nullptr;
    threadIdx.x = fiber.thread;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// A thread that ends without having waited leaves its fiber to the next one.
inline void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    Fiber& self = *running;
    while (threads_begun < blockDim.x) {
        threadIdx.x = self.thread = threads_begun++;
        thread_body();
    }
    self.ended = true;
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
}

inline void begin(Fiber& fiber) {
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, fiber_main, 0);
    resume(fiber);
}

inline void wait_at(Meeting& meeting) {
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.times;
        return;
    }
    running->waits_for = &meeting;
    running->times = meeting.times;
    pause();
}

// Did anyone go on?
inline bool resume_all(const std::vector<Fiber*>& warp) {
    bool any = false;
    for (Fiber* fiber : warp) {
        if (fiber->ended || fiber->waits_for->times == fiber->times) continue;
        resume(*fiber);
        any = true;
    }
    return any;
}

inline void run_block() {
    block_meeting.size = blockDim.x;
    block_meeting.arrived = 0;
    warp_meetings.resize((blockDim.x + kWarp - 1) / kWarp);
    for (Meeting& meeting : warp_meetings) meeting.size = kWarp, meeting.arrived = 0;
    threads_begun = 0;
    size_t in_use = 0;
    while (threads_begun < blockDim.x) {
        if (in_use == fibers.size()) fibers.emplace_back(new Fiber);
        begin(*fibers[in_use++]);
    }
    std::vector<std::vector<Fiber*>> warps(warp_meetings.size());
    for (size_t n = 0; n < in_use; ++n)
        if (!fibers[n]->ended) warps[fibers[n]->thread / kWarp].push_back(fibers[n].get());
    for (;; std::reverse(warps.begin(), warps.end())) {
        bool all_ended = true, stuck = true;
        for (auto& warp : warps) {
            while (resume_all(warp)) stuck = false;
            for (const Fiber* fiber : warp) all_ended &= fiber->ended;
        }
        if (all_ended) return;
        if (stuck) fail("threads wait for others that have left or wait elsewhere");
    }
}

template <class T>
T from_lane(unsigned mask, T x, unsigned lane) {
    static_assert(sizeof(T) == 4, "a word");
    if (mask != 0xffffffffu || blockDim.x % kWarp) fail("only whole warps can exchange words here");
    Meeting& meeting = warp_meetings[threadIdx.x / kWarp];
    uint32_t* const words = meeting.words[meeting.times % 2];
    std::memcpy(words + threadIdx.x % kWarp, &x, 4);
    wait_at(meeting);
    std::memcpy(&x, words + lane, 4);
    return x;
}

template <class... Args, size_t... I>
void launch(void (*kernel)(Args...), dim3 grid, void** args, std::index_sequence<I...>) {
    const std::tuple<Args...> values(*static_cast<Args*>(args[I])...);
    thread_body = [&] { kernel(std::get<I>(values)...); };
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

}  // namespace simt

inline void __syncthreads() { simt::wait_at(simt::block_meeting); }
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return simt::from_lane(mask, x, threadIdx.x % simt::kWarp ^ bits);
}

template <class... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    if (!grid.x || !block.x || block.x > 1024) return cudaErrorInvalidConfiguration;
    if (shared > simt::kMaxShared) return cudaErrorInvalidValue;
    gridDim = grid;
    blockDim = block;
    const std::unique_ptr<char[]> memory(new char[shared]);
    std::memset(memory.get(), 0xff, shared);
    simt::dynamic_shared = memory.get();
    simt::launch(kernel, grid, args, std::index_sequence_for<Args...>());
    return cudaSuccess;
}
