/* The processor's matrix tiles (AMX), where compiler and system have them: then HAVE_TILES is defined.

   A tile holds up to 16 rows of 64 bytes. C += A B takes A as rows of bfloat16 and B in pairs: its row r has the rows 2 r
   and 2 r + 1 of the matrix, interleaved. */

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAVE_TILES
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) layout;

/* Whether the system lets this process use tiles, for which it wants to be asked. */
static int tiles_allowed(void) {
    static int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return answer;
}

/* Tiles, and their layout, are written and read behind the compiler's back. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Does something with tiles of one layout, and gives the thread back the layout that it had. */
#define TILES(wanted, something)                                                                                           \
    do {                                                                                                                   \
        layout before __attribute__((aligned(64)));                                                                        \
        _tile_storeconfig(&before);                                                                                        \
        WRITTEN;                                                                                                           \
        _tile_loadconfig(&(wanted));                                                                                       \
        something;                                                                                                         \
        if (before.palette)                                                                                                \
            _tile_loadconfig(&before);                                                                                     \
        else                                                                                                               \
            _tile_release();                                                                                               \
    } while (0)

#else

#define tiles_allowed() 0

#endif
