// Compiling a part of a file for an instruction set that the rest of the program may not assume. Standard headers come
// before, so that none of their inline functions is compiled for it and then used elsewhere.
#pragma once

#define PETALITE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PETALITE_TARGET_BEGIN(features) \
    PETALITE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PETALITE_TARGET_END PETALITE_PRAGMA(clang attribute pop)
#else
#define PETALITE_TARGET_BEGIN(features) PETALITE_PRAGMA(GCC push_options) PETALITE_PRAGMA(GCC target(features))
#define PETALITE_TARGET_END PETALITE_PRAGMA(GCC pop_options)
#endif
