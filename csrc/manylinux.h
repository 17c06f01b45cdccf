// For wheels (OCTAVO_MANYLINUX): included before every source. glibc offers what changed under the old name and version
// too; without this the linker takes the newest version, which an older glibc lacks. exp and log compute the same bits
// under both versions: the new ones differ in how errors are told to programs of the System V Interface Definition.
#pragma once

#if defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.2.5");
__asm__(".symver pthread_setaffinity_np, pthread_setaffinity_np@GLIBC_2.3.4");
#elif defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
__asm__(".symver log, log@GLIBC_2.17");
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.17");
__asm__(".symver pthread_setaffinity_np, pthread_setaffinity_np@GLIBC_2.17");
#else
#error "the oldest versions of glibc's functions are not known for this processor"
#endif
