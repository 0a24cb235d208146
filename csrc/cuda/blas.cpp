#include "blas.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace dalle_fast {
namespace {

// From cublas_api.h and library_types.h, the same in cuBLAS 11 to 13.
constexpr int kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14;  // cudaDataType_t
constexpr int kPlain = 0, kTransposed = 1;                 // cublasOperation_t
constexpr int kComputeFloat32 = 68;                        // cublasComputeType_t
constexpr int kAnyAlgorithm = -1;                          // cublasGemmAlgo_t
// cublasMath_t: CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, beside the other bits.
constexpr int kNoRoundedSums = 16;

using GemmEx = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                       int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                       int ldc, int compute_type, int algorithm);
using GetMathMode = int (*)(void* handle, int* mode);
using SetMathMode = int (*)(void* handle, int mode);

struct Functions {
    GemmEx gemm;
    GetMathMode get_mode;
    SetMathMode set_mode;
};

template <class Function>
Function find(const char* name) {
    if (void* found = find_in_cublas(name)) return reinterpret_cast<Function>(found);
    throw std::runtime_error(std::string("no ") + name + " in this process: cuBLAS comes with a torch built for CUDA");
}

const Functions& cublas() {
    static const Functions functions = {find<GemmEx>("cublasGemmEx"), find<GetMathMode>("cublasGetMathMode"),
                                        find<SetMathMode>("cublasSetMathMode")};
    return functions;
}

void check(int status, const char* what) {
    if (status) throw std::runtime_error(std::string(what) + " returned cublasStatus_t " + std::to_string(status));
}

int type_of(const Matrix& x) {
    switch (x.dtype) {
        case DType::float32: return kFloat32;
        case DType::float16: return kFloat16;
        case DType::bfloat16: return kBFloat16;
    }
    throw std::invalid_argument("dtype must be 0, 1 or 2, got " + std::to_string(int32_t(x.dtype)));
}

int to_int(int64_t size) {
    if (size < 1 || size > std::numeric_limits<int>::max())
        throw std::invalid_argument("cuBLAS has sizes and strides of 1 to 2^31 - 1, got " + std::to_string(size));
    return int(size);
}

}  // namespace

Matrix Matrix::from_row(int64_t row) const {
    const int64_t bytes = dtype == DType::float32 ? 4 : 2;
    return {static_cast<char*>(data) + row * bytes * (transposed ? 1 : stride), dtype, stride, transposed};
}

Blas::Blas(void* handle) : handle_(handle), mode_(0) {
    check(cublas().get_mode(handle_, &mode_), "cublasGetMathMode");
    check(cublas().set_mode(handle_, mode_ | kNoRoundedSums), "cublasSetMathMode");
}

Blas::~Blas() { cublas().set_mode(handle_, mode_); }

// cuBLAS has matrices by columns: to it, memory that we call c is c.T = b.T @ a.T, and a matrix that is not transposed
// to us has its transpose in memory, which is what these products want.
void Blas::product(int64_t rows, int64_t columns, int64_t depth, const Matrix& a, const Matrix& b, const Matrix& c,
                   float beta) const {
    const float alpha = 1;
    const auto op = [](const Matrix& x) { return x.transposed ? kTransposed : kPlain; };
    check(cublas().gemm(handle_, op(b), op(a), to_int(columns), to_int(rows), to_int(depth), &alpha, b.data, type_of(b),
                        to_int(b.stride), a.data, type_of(a), to_int(a.stride), &beta, c.data, type_of(c),
                        to_int(c.stride), kComputeFloat32, kAnyAlgorithm),
          "cublasGemmEx");
}

}  // namespace dalle_fast
