// For wheels (OCTAVO_MANYLINUX): what g++'s headers take from its own libraries and those of manylinux_2_28 lack.
#include <new>

extern "C" {

// glibc 2.32. shared_ptr counts without atomics while this is true; never is right, too.
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// GLIBCXX_3.4.29, std::__throw_bad_array_new_length(): what an allocator throws when a size overflows.
[[noreturn, gnu::visibility("hidden")]] void octavo_throw_bad_array_new_length() __asm__(
    "_ZSt28__throw_bad_array_new_lengthv");
void octavo_throw_bad_array_new_length() { throw std::bad_array_new_length(); }

}  // extern "C"
