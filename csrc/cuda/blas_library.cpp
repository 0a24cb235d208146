// Where cuBLAS is: in the process already, as torch is linked with it. Nothing here is, so that the module loads
// where there is none and works with whichever version torch has brought.
#include <dlfcn.h>

#include <initializer_list>

#include "blas.h"

namespace dalle_fast {

// Torch's handle is one of torch's cuBLAS, and another may have been loaded too, as by a library for another CUDA. So
// torch's own library is asked first: a name is then looked for in what it is linked with. The others are for a torch
// that has no library of this name.
void* find_in_cublas(const char* name) {
    for (const char* library : {"libtorch_cuda.so", "libcublas.so.13", "libcublas.so.12"}) {
        void* const loaded = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
        if (!loaded) continue;
        void* const found = dlsym(loaded, name);
        dlclose(loaded);  // torch keeps it
        if (found) return found;
    }
    return dlsym(RTLD_DEFAULT, name);
}

}  // namespace dalle_fast
