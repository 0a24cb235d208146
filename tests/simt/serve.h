// Serves calls from standard input: what was built with sanitizers cannot be loaded into Python, and a program for each
// call would take longer to start than to run.
//
// A request: how many numbers and buffers, the numbers, and of each buffer its size in bytes (-1: none, a null pointer;
// -2 - n: where buffer n is) and its bytes. The reply: 0 and the bytes of all buffers that have some, or the length of
// an error's message and the message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace serve {

inline std::vector<int64_t> numbers;
inline std::vector<void*> buffers;
inline size_t next_number, next_buffer;

// The next ones of the request that is being served.
inline int64_t number() { return numbers.at(next_number++); }
template <class T>
T* buffer() {
    return static_cast<T*>(buffers.at(next_buffer++));
}

inline bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }
inline int64_t read_number() {
    int64_t x;
    if (!read(&x, sizeof x)) std::exit(0);
    return x;
}
inline void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }
inline void write_number(int64_t x) { write(&x, sizeof x); }

template <class Call>
[[noreturn]] void requests(Call call) {
    for (;;) {
        next_number = next_buffer = 0;
        numbers.resize(size_t(read_number()));
        buffers.assign(size_t(read_number()), nullptr);
        for (int64_t& x : numbers) x = read_number();
        std::vector<std::pair<void*, size_t>> owned;
        for (void*& place : buffers) {
            const int64_t bytes = read_number();
            if (bytes < 0) {
                place = bytes == -1 ? nullptr : buffers.at(size_t(-2 - bytes));
                continue;
            }
            place = std::malloc(size_t(bytes));  // of this size, for the sanitizer guards its ends
            owned.emplace_back(place, size_t(bytes));
            if (!read(place, size_t(bytes))) std::exit(1);
        }
        try {
            call();
            write_number(0);
            for (const auto& [memory, bytes] : owned) write(memory, bytes);
        } catch (const std::exception& error) {
            const std::string what = error.what();
            write_number(int64_t(what.size()));
            write(what.data(), what.size());
        }
        std::fflush(stdout);
        for (const auto& [memory, bytes] : owned) std::free(memory);
    }
}

}  // namespace serve
