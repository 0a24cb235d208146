// Tensors as DLPack describes them, version 1 (https://dmlc.github.io/dlpack), and the table by which a library hands out
// such descriptions to C: all numbers of a tensor in one call. Names and layout are DLPack's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dalle_fast {

struct DLDevice { int32_t device_type, device_id; };
struct DLDataType { uint8_t code, bits; uint16_t lanes; };
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;  // in elements
    uint64_t byte_offset;
};

struct DLPackExchangeAPI {
    uint32_t major, minor;
    void *older_version, *allocate, *from_python, *to_python;  // not used here
    int (*describe)(PyObject* tensor, DLTensor* out);          // null where there is none; 0, or an exception is set
};

// The table of a tensor's type, its `__dlpack_c_exchange_api__`; null where it is not one that this knows.
inline const DLPackExchangeAPI* exchange_api(pybind11::handle capsule) {
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    return api->major == 1 && api->describe ? api : nullptr;
}

// False where a tensor has no description. It is valid as long as the tensor is.
inline bool describe(const DLPackExchangeAPI& api, pybind11::handle tensor, DLTensor& out) {
    if (api.describe(tensor.ptr(), &out) == 0) return true;
    PyErr_Clear();
    return false;
}

}  // namespace dalle_fast
