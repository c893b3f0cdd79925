/* What the C files here share: bfloat16, vectors of 16 floats, powers of two. */

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
    return __builtin_convertvector(part, words);
}

INLINE floats pick(masks which, floats a, floats b) { return (floats)(((words)a & (words)which) | ((words)b & ~(words)which)); }

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
