/* What the C files here share: bfloat16, vectors of 16 floats, powers of two. */

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define LOG2E 1.44269504f

/* Numbers near the end of the range, which gradients that vanish are made of, take many times as long; here they are
   zero. */
#ifdef __SSE2__
#define FLUSH unsigned int mode = __builtin_ia32_stmxcsr(); __builtin_ia32_ldmxcsr(mode | 0x8040)
#define RESTORE __builtin_ia32_ldmxcsr(mode)
#else
#define FLUSH
#define RESTORE
#endif

typedef uint16_t bf16;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t masks __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));

/* n values in the lower halves of words; the lanes after them are zero. */
INLINE words load_halves(const bf16 *x, int64_t n) {
    halves part = {0};
    if (n >= LANES)
        memcpy(&part, x, sizeof part);
    else
        memcpy(&part, x, n * sizeof(bf16));
#ifdef __AVX512F__
    return (words)_mm512_cvtepu16_epi32((__m256i)part); /* which GCC 12 does in two halves */
#else
    return __builtin_convertvector(part, words);
#endif
}

INLINE floats pick(masks which, floats a, floats b) { return (floats)(((words)a & (words)which) | ((words)b & ~(words)which)); }

#ifdef __AVX512DQ__

/* z less the whole number below it. */
INLINE floats fraction(floats z) { return (floats)_mm512_reduce_ps((__m512)z, 1); }

/* p 2^n, n being the whole number below z; zero where FLUSH makes it that. */
INLINE floats scaled(floats p, floats z) { return (floats)_mm512_scalef_ps((__m512)p, (__m512)z); }

/* 2^z to 2e-7, 3e-6 and 8e-5, relative; NaN stays NaN. */
INLINE floats power(floats z) {
    floats f = fraction(z), p = f * 1.87757192e-3f + 8.98935273e-3f;
    p = ((p * f + 5.58263063e-2f) * f + 2.40153626e-1f) * f + 6.93153083e-1f;
    return scaled(p * f + 9.9999994e-1f, z);
}

INLINE floats fair_power(floats z) {
    floats f = fraction(z), p = f * 1.35341687e-2f + 5.20114601e-2f;
    return scaled(((p * f + 2.41442755e-1f) * f + 6.93003833e-1f) * f + 1.00000262f, z);
}

INLINE floats coarse_power(floats z) {
    floats f = fraction(z), p = f * 7.8023009e-2f + 2.26069391e-1f;
    return scaled((p * f + 6.95832849e-1f) * f + 9.99925256e-1f, z);
}

/* 1 / x to 1e-7, relative; infinity has none. */
INLINE floats inverse(floats x) {
    floats guess = (floats)_mm512_rcp14_ps((__m512)x);
    return guess * (2.0f - x * guess);
}

#else

/* 2^z to 2e-7, relative, for z < 126; 0 below 2^-100, as numbers near the end of the range are slow. NaN stays NaN. */
INLINE floats power(floats z) {
    const floats low = (floats){0} - 100.0f;
    masks tiny = z < low;
    floats shifted = z + 12582912.0f; /* its last bits are the integer next to z */
    floats f = z - (shifted - 12582912.0f);
    floats p = f * 1.52527338e-5f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    p *= (floats)(((words)shifted << 23) + 0x3f800000);
    return (floats)((words)p & ~(words)tiny);
}

#define fair_power power

INLINE floats inverse(floats x) { return 1.0f / x; }

#endif
