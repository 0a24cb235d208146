// cuBLAS for the host, as far as csrc/cuda/blas.cpp needs it: plain loops over matrices by columns, which complain of
// what the library would. The handle is kHandle.
#include "../../csrc/cuda/blas.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kNotInitialized = 1, kInvalidValue = 7, kNotSupported = 15;
constexpr intptr_t kHandle = 77;

int math_mode;

int get_math_mode(void* handle, int* mode) {
    *mode = math_mode;
    return handle == reinterpret_cast<void*>(kHandle) ? 0 : kNotInitialized;
}

int set_math_mode(void* handle, int mode) {
    math_mode = mode;
    return handle == reinterpret_cast<void*>(kHandle) ? 0 : kNotInitialized;
}

float load(const void* numbers, int type, int64_t at) {
    switch (type) {
        case 0: return static_cast<const float*>(numbers)[at];
        case 2: return __half2float(static_cast<const __half*>(numbers)[at]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(numbers)[at]);
    }
}

void store(void* numbers, int type, int64_t at, float x) {
    switch (type) {
        case 0: static_cast<float*>(numbers)[at] = x; return;
        case 2: static_cast<__half*>(numbers)[at] = __float2half_rn(x); return;
        default: static_cast<__nv_bfloat16*>(numbers)[at] = __float2bfloat16_rn(x);
    }
}

int gemm(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
         const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute_type,
         int algorithm) {
    if (handle != reinterpret_cast<void*>(kHandle)) return kNotInitialized;
    if (m < 0 || n < 0 || k < 0 || (op_a | op_b) >> 1) return kInvalidValue;
    if (lda < std::max(1, op_a ? k : m) || ldb < std::max(1, op_b ? n : k) || ldc < std::max(1, m))
        return kInvalidValue;
    const bool known = a_type == 0 || a_type == 2 || a_type == 14;
    if (!known || a_type != b_type || (c_type != 0 && c_type != a_type)) return kNotSupported;
    if (compute_type != 68 || algorithm != -1) return kNotSupported;
    if (!(math_mode & 16)) return kNotSupported;  // cuBLAS would not mind, but then it may round parts of sums
    float alpha_value, beta_value;
    std::memcpy(&alpha_value, alpha, sizeof(float));
    std::memcpy(&beta_value, beta, sizeof(float));
    for (int64_t column = 0; column < n; ++column)
        for (int64_t row = 0; row < m; ++row) {
            double sum = 0;
            for (int64_t d = 0; d < k; ++d)
                sum += double(load(a, a_type, op_a ? d + row * lda : row + d * lda)) *
                       double(load(b, b_type, op_b ? column + d * ldb : d + column * ldb));
            double result = alpha_value * sum;
            if (beta_value != 0) result += beta_value * double(load(c, c_type, row + column * ldc));
            store(c, c_type, row + column * ldc, float(result));
        }
    return 0;
}

}  // namespace

void* dalle_fast::find_in_cublas(const char* name) {
    if (!std::strcmp(name, "cublasGemmEx")) return reinterpret_cast<void*>(gemm);
    if (!std::strcmp(name, "cublasGetMathMode")) return reinterpret_cast<void*>(get_math_mode);
    if (!std::strcmp(name, "cublasSetMathMode")) return reinterpret_cast<void*>(set_math_mode);
    return nullptr;
}
