// Where cuBLAS is: in the process already, as torch is linked with it. Nothing here is, so that the module loads
// where there is none and works with whichever version torch has brought.
#include <dlfcn.h>

#include <initializer_list>

#include "blas.h"

namespace dalle_fast {

void* find_in_cublas(const char* name) {
    if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
    // Python loads libraries so that nobody else sees their names: these have to be asked by theirs.
    for (const char* library : {"libcublas.so.13", "libcublas.so.12"}) {
        void* const loaded = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
        if (!loaded) continue;
        void* const found = dlsym(loaded, name);
        dlclose(loaded);  // torch keeps it
        if (found) return found;
    }
    return nullptr;
}

}  // namespace dalle_fast
