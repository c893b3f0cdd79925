/* The derivative of a 3x3 convolution (stride 1, zeros around the image) by its weights and bias, from images in bfloat16
   whose channels come last: float results.

   Of tap (dy, dx) it is the sum of g(r, c) x(r + dy - 1, c + dx - 1)^T over pixels and images. The products are of two images
   at once, the two of a pair interleaved. Pixels become a line, row after row with two more columns each, which are zero in
   x; then a tap is an offset along x's line. Images are packed by portions that stay in the cache, and the sums of a portion
   go on where those of the one before ended, in an order that does not depend on the number of threads. */

#include "tiles.h"
#include "vectors.h"

#include "pairs.h"

#ifdef HAVE_PAIRS

#define PORTION (1536 << 10) /* bytes of packed images */
#define TAPS 9

typedef struct {
    const bf16 *x, *g;
    float *of_weight;
    int64_t images, height, width, in, out;
    int64_t row, line;             /* positions of a row, and of x's line */
    int64_t g_line;                /* positions of g's line */
    int64_t in_blocks, out_blocks; /* of 16 channels */
    int64_t pairs, portion;        /* of images, and how many of them at a time */
    words *packed_x, *packed_g;    /* (portion, blocks, line, 16) and (portion, blocks, g_line, 16) */
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

#include "conv_weights_pairs.h"
#ifdef HAVE_TILES
#include "conv_weights_tiles.h"
#endif

/* A thread's share. Each has the same channels of g and of the result to the end and at the next call, as lines that another
   core has written take long to come. */
INLINE void work(const problem *p, int tiles) {
    int64_t pixels = p->height * p->width, step = tiles ? 2 : 1, columns = (p->in_blocks + step - 1) / step;
    for (int64_t start = 0; start < p->pairs; start += p->portion) {
        int64_t count = p->pairs - start < p->portion ? p->pairs - start : p->portion;
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < count * p->out_blocks; task++) {
            int64_t block = task / count, q = task % count, image = 2 * (start + q);
            const bf16 *a = p->g + image * pixels * p->out + block * LANES;
            const bf16 *b = image + 1 < p->images ? a + pixels * p->out : NULL;
            words *to = p->packed_g + (q * p->out_blocks + block) * p->g_line;
            float *sums = p->sums + ((start + q) * p->out_blocks + block) * LANES;
#ifdef HAVE_TILES
            if (tiles)
                pack_g_tiles(p, a, b, p->out - block * LANES, to, sums);
            else
#endif
                pack_g(p, a, b, p->out - block * LANES, to, sums);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < count * p->in_blocks; task++) {
            int64_t q = task / p->in_blocks, block = task % p->in_blocks, image = 2 * (start + q);
            const bf16 *a = p->x + image * pixels * p->in + block * LANES;
            pack_x(p, a, image + 1 < p->images ? a + pixels * p->in : NULL, p->in - block * LANES,
                   p->packed_x + (q * p->in_blocks + block) * p->line);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p->out_blocks * columns * 3; task++) {
            int64_t m = task / (columns * 3), n = task / 3 % columns * step, dy = task % 3;
#ifdef HAVE_TILES
            if (tiles)
                add_tiles(p, count, m, n, dy, start == 0);
            else
#endif
                add_pairs(p, count, m, n, dy, start == 0);
        }
    }
}

/* Whether this processor has what it takes. */
int conv_weights_available(void) { return 1; }

/* x: (images, height, width, in), g: (images, height, width, out); of_weight: (out, 3, 3, in), of_bias: (out), may be NULL.
   Returns 0, or 1 without memory. */
int conv_weights(const bf16 *x, const bf16 *g, float *of_weight, float *of_bias, int64_t images, int64_t height, int64_t width,
                 int64_t in, int64_t out, int threads) {
    problem p = {.x = x, .g = g, .of_weight = of_weight, .images = images, .height = height, .width = width, .in = in, .out = out};
    int tiles = tiles_allowed();
    int64_t steps = (height * (width + 2) - 2 + LANES - 1) / LANES; /* of 16 positions */
    p.row = width + 2;
    p.line = steps * LANES + 2 * p.row + 2;
    p.g_line = tiles ? steps * LANES : height * width;
    p.in_blocks = (in + LANES - 1) / LANES;
    p.out_blocks = (out + LANES - 1) / LANES;
    p.pairs = (images + 1) / 2;
    int64_t x_size = p.in_blocks * p.line * sizeof(words), g_size = p.out_blocks * p.g_line * sizeof(words);
    p.portion = PORTION / (x_size + g_size);
    if (p.portion > p.pairs) p.portion = p.pairs;
    if (p.portion < 1) p.portion = 1;
    p.packed_x = aligned_alloc(64, p.portion * x_size);
    p.packed_g = aligned_alloc(64, p.portion * g_size);
    p.sums = malloc(p.pairs * p.out_blocks * LANES * sizeof(float));
    int failed = !p.packed_x || !p.packed_g || !p.sums;
    if (!failed) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#ifdef HAVE_TILES
            if (tiles)
                TILES(FULL, work(&p, 1));
            else
#endif
                work(&p, 0);
        }
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
