/* The derivative of a 3x3 convolution (stride 1, zeros around the image) by its weights and bias, from images in bfloat16
   whose channels come last, by matrix tiles: float results.

   Of tap (dy, dx) it is the sum of g(r, c) x(r + dy - 1, c + dx - 1)^T over pixels and images. Pixels become a line, row
   after row with two more columns each, for which g is zero; then a tap is an offset along x's line. A tile takes 16
   positions of two images at once, the two of a pair interleaved, so that no offset splits a pair. Images are packed by
   portions that stay in the cache, and the sums of a portion go on where those of the one before ended, in an order that
   does not depend on the number of threads. */

#include "tiles.h"
#include "vectors.h"

#ifdef HAVE_TILES

#define WORDS 256            /* of a tile */
#define PORTION (1536 << 10) /* bytes of packed images */
#define TAPS 9

static const layout FULL = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

typedef struct {
    const bf16 *x, *g;
    float *of_weight;
    int64_t images, height, width, in, out;
    int64_t row, steps, line;      /* positions of a row; 16 positions each of g's line; positions of x's line */
    int64_t in_blocks, out_blocks; /* of 16 channels */
    int64_t pairs, portion;        /* of images, and how many of them at a time */
    words *packed_x, *packed_g;    /* (portion, blocks, line, 16) and (portion, blocks, steps, 16, 16) */
    float *sums;                   /* of g, (pairs, blocks, 16) */
} problem;

/* n channels of the same pixel of two images, of which the second may be missing. */
INLINE words pair(const bf16 *a, const bf16 *b, int64_t n) {
    words both = load_halves(a, n);
    if (b) both |= load_halves(b, n) << 16;
    return both;
}

/* 16 channels of a pair of images as lines of 16 words: (positions of x's line, 16). */
static void pack_x(const problem *p, const bf16 *a, const bf16 *b, int64_t channels, words *to) {
    const words zero = {0};
    words *end = to + p->line;
    for (int64_t i = 0; i < p->row + 1; i++) *to++ = zero;
    for (int64_t r = 0; r < p->height; r++) {
        for (int64_t c = 0; c < p->width; c++) {
            *to++ = pair(a, b, channels);
            a += p->in;
            if (b) b += p->in;
        }
        *to++ = zero;
        *to++ = zero;
    }
    while (to < end) *to++ = zero;
}

INLINE void transpose(words rows[LANES], words *to) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        to[i] = (words)_mm512_shuffle_i32x4(low, low2, 0x88);
        to[i + 8] = (words)_mm512_shuffle_i32x4(low, low2, 0xdd);
        to[i + 4] = (words)_mm512_shuffle_i32x4(high, high2, 0x88);
        to[i + 12] = (words)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

/* 16 channels of a pair of images as tiles, (steps, 16 channels, 16 positions), and their sums. */
static void pack_g(const problem *p, const bf16 *a, const bf16 *b, int64_t channels, words *to, float *sums) {
    floats sum = {0};
    int64_t r = 0, c = 0;
    for (int64_t step = 0; step < p->steps; step++, to += LANES) {
        words rows[LANES];
        for (int i = 0; i < LANES; i++) {
            rows[i] = (words){0};
            if (c < p->width && r < p->height) {
                rows[i] = pair(a, b, channels);
                sum += (floats)(rows[i] << 16) + (floats)(rows[i] & 0xffff0000);
                a += p->out;
                if (b) b += p->out;
            }
            if (++c == p->row) c = 0, r++;
        }
        transpose(rows, to);
    }
    memcpy(sums, &sum, sizeof sum);
}

/* Where a tile of weights is, or if it has channels that are padding a copy of it; and back. */
INLINE float *begin(const problem *p, float *at, int64_t m, int64_t n, float *copy, int64_t *stride, int first) {
    if (m == LANES && n == LANES) {
        *stride = TAPS * p->in;
        return at;
    }
    *stride = LANES;
    memset(copy, 0, WORDS * sizeof(float));
    for (int64_t i = 0; i < m && !first; i++) memcpy(copy + i * LANES, at + i * TAPS * p->in, n * sizeof(float));
    return copy;
}

INLINE void end(const problem *p, float *at, int64_t m, int64_t n, const float *copy) {
    if (m == LANES && n == LANES) return;
    for (int64_t i = 0; i < m; i++) memcpy(at + i * TAPS * p->in, copy + i * LANES, n * sizeof(float));
}

#define SIX(WHAT) WHAT(0, 0, 0) WHAT(1, 0, 1) WHAT(2, 0, 2) WHAT(3, 1, 0) WHAT(4, 1, 1) WHAT(5, 1, 2)

/* The weights of 16 channels of the result, of one or two blocks of 16 of x, and of the taps of one row; of so many
   packed pairs, plus what was there unless these are the first. */
static void add_pairs(const problem *p, int64_t pairs, int64_t m_block, int64_t n_block, int64_t dy, int first) {
    float copies[6][WORDS] __attribute__((aligned(64))), *at[6], *tile[6];
    int64_t stride[6], m = p->out - m_block * LANES, n[2];
    int two = n_block + 1 < p->in_blocks;
    if (m > LANES) m = LANES;
    for (int i = 0; i < (two ? 6 : 3); i++) {
        int64_t from = (n_block + i / 3) * LANES;
        n[i / 3] = p->in - from < LANES ? p->in - from : LANES;
        at[i] = p->of_weight + (m_block * LANES * TAPS + dy * 3 + i % 3) * p->in + from;
        tile[i] = begin(p, at[i], m, n[i / 3], copies[i], &stride[i], first);
    }
    WRITTEN;
#define START(t, j, dx)                                         \
    if (j == 0 || two) {                                        \
        if (first)                                              \
            _tile_zero(t);                                      \
        else                                                    \
            _tile_loadd(t, tile[t], stride[t] * sizeof(float)); \
    }
    SIX(START)
    for (int64_t q = 0; q < pairs; q++) {
        const words *g = p->packed_g + (q * p->out_blocks + m_block) * p->steps * LANES;
        const words *x = p->packed_x + (q * p->in_blocks + n_block) * p->line + dy * p->row, *y = x + p->line;
#define ADD(t, j, dx)                     \
    _tile_loadd(7, (j ? y : x) + dx, 64); \
    _tile_dpbf16ps(t, 6, 7);
        for (int64_t step = 0; step < p->steps; step++, g += LANES, x += LANES, y += LANES) {
            _tile_loadd(6, g, 64);
            if (two) {
                SIX(ADD)
            } else {
                ADD(0, 0, 0) ADD(1, 0, 1) ADD(2, 0, 2)
            }
        }
    }
#define STOP(t, j, dx) \
    if (j == 0 || two) _tile_stored(t, tile[t], stride[t] * sizeof(float));
    SIX(STOP)
    WRITTEN;
    for (int i = 0; i < (two ? 6 : 3); i++) end(p, at[i], m, n[i / 3], copies[i]);
}

/* A thread's share. Each has the same channels of g and of the result to the end and at the next call, as lines that another
   core has written take long to come. */
static void work(const problem *p) {
    int64_t pixels = p->height * p->width, columns = (p->in_blocks + 1) / 2;
    for (int64_t start = 0; start < p->pairs; start += p->portion) {
        int64_t count = p->pairs - start < p->portion ? p->pairs - start : p->portion;
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < count * p->out_blocks; task++) {
            int64_t block = task / count, q = task % count, image = 2 * (start + q);
            const bf16 *a = p->g + image * pixels * p->out + block * LANES;
            pack_g(p, a, image + 1 < p->images ? a + pixels * p->out : NULL, p->out - block * LANES,
                   p->packed_g + (q * p->out_blocks + block) * p->steps * LANES,
                   p->sums + ((start + q) * p->out_blocks + block) * LANES);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * p->in_blocks; task++) {
            int64_t q = task / p->in_blocks, block = task % p->in_blocks, image = 2 * (start + q);
            const bf16 *a = p->x + image * pixels * p->in + block * LANES;
            pack_x(p, a, image + 1 < p->images ? a + pixels * p->in : NULL, p->in - block * LANES,
                   p->packed_x + (q * p->in_blocks + block) * p->line);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p->out_blocks * columns * 3; task++)
            add_pairs(p, count, task / (columns * 3), task / 3 % columns * 2, task % 3, start == 0);
    }
}

/* Whether this processor and system have tiles. */
int conv_weights_available(void) { return tiles_allowed(); }

/* x: (images, height, width, in), g: (images, height, width, out); of_weight: (out, 3, 3, in), of_bias: (out), may be NULL.
   Returns 0, or 1 without memory. */
int conv_weights(const bf16 *x, const bf16 *g, float *of_weight, float *of_bias, int64_t images, int64_t height, int64_t width,
                 int64_t in, int64_t out, int threads) {
    problem p = {.x = x, .g = g, .of_weight = of_weight, .images = images, .height = height, .width = width, .in = in, .out = out};
    p.row = width + 2;
    p.steps = (height * p.row - 2 + LANES - 1) / LANES;
    p.line = p.steps * LANES + 2 * p.row + 2;
    p.in_blocks = (in + LANES - 1) / LANES;
    p.out_blocks = (out + LANES - 1) / LANES;
    p.pairs = (images + 1) / 2;
    int64_t x_size = p.in_blocks * p.line * sizeof(words), g_size = p.out_blocks * p.steps * LANES * sizeof(words);
    p.portion = PORTION / (x_size + g_size);
    if (p.portion > p.pairs) p.portion = p.pairs;
    if (p.portion < 1) p.portion = 1;
    p.packed_x = aligned_alloc(64, p.portion * x_size);
    p.packed_g = aligned_alloc(64, p.portion * g_size);
    p.sums = malloc(p.pairs * p.out_blocks * LANES * sizeof(float));
    int failed = !p.packed_x || !p.packed_g || !p.sums;
    if (!failed) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        TILES(FULL, work(&p));
        for (int64_t c = 0; c < out && of_bias; c++) {
            double sum = 0.0;
            for (int64_t q = 0; q < p.pairs; q++) sum += p.sums[q * p.out_blocks * LANES + c];
            of_bias[c] = (float)sum;
        }
    }
    free(p.packed_x);
    free(p.packed_g);
    free(p.sums);
    return failed;
}

#else

int conv_weights_available(void) { return 0; }

#endif
