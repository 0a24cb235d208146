// Matrix products by the cuBLAS that torch has loaded. Sums are float32, whatever the dtype of the numbers.
#pragma once

#include <cstdint>

#include "../codebook.h"

namespace dalle_fast {

// A matrix on the device: neighbours in a row are neighbours in memory or, where it is transposed, those in a column.
struct Matrix {
    void* data;
    DType dtype;
    int64_t stride;  // numbers from one row to the next; where it is transposed, from one column to the next
    bool transposed;

    Matrix t() const { return {data, dtype, stride, !transposed}; }
    Matrix from_row(int64_t row) const;
};

// Torch's handle (torch.cuda.current_blas_handle(), which has the stream and the workspace) while it is in use here:
// parts of a sum are not rounded to 16 bits, and float32 is multiplied as torch.backends.cuda.matmul says.
class Blas {
public:
    explicit Blas(void* handle);
    ~Blas();
    Blas(const Blas&) = delete;
    Blas& operator=(const Blas&) = delete;

    // c (rows, columns) = a (rows, depth) @ b (depth, columns) + beta * c, where c is not transposed and nothing is
    // empty. With beta = 0 it does not matter what is in c.
    void product(int64_t rows, int64_t columns, int64_t depth, const Matrix& a, const Matrix& b, const Matrix& c,
                 float beta = 0) const;

private:
    void* handle_;
    int mode_;  // torch's
};

// A function of cuBLAS, or null. tests/simt has its own.
void* find_in_cublas(const char* name);

}  // namespace dalle_fast
