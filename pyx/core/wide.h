#ifndef KVB_WIDE_H
#define KVB_WIDE_H

/* Loops over tokens, compiled for wider vectors too; the loader takes what the processor has. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define KVB_WIDE __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define KVB_WIDE
#endif

#endif
