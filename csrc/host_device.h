// Marks functions that are one text for host and device.
#pragma once

#if defined(__CUDACC__)
#define DALLE_FAST_HOST_DEVICE __host__ __device__
// Inlined wherever it is called: files that are compiled once per instruction set must not share a copy.
#define DALLE_FAST_INLINE static __host__ __device__ __forceinline__
#else
#define DALLE_FAST_HOST_DEVICE
#define DALLE_FAST_INLINE static inline __attribute__((always_inline))
#endif
