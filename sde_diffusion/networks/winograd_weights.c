/* The derivative of a 3x3 convolution (stride 1, zeros around the image) by its weights and bias, from images in bfloat16
   whose channels come last, with Winograd's products (see winograd.c): float results.

   With the pixels d and the gradient g of a tile of 2x2 results it is G' ((A g A') (B' d B)) G: 16 products of matrices, summed
   over tiles. Both factors are rounded to bfloat16. Tiles are transformed by portions that stay in the cache, two by two as
   the products take them, and the sums of a portion go on where those of the one before ended, in an order that does not
   depend on the number of threads. */

#include "vectors.h"

#include "pairs.h"

#ifdef HAVE_PAIRS
#include "winograd.h"

#define PORTION (1024 << 10) /* bytes of transformed tiles */
#define TAPS 9

typedef struct {
    const bf16 *x, *g;
    float *of_weight;
    double *of_bias;
    grid of;
    int64_t in, out;               /* channels */
    int64_t tiles, pairs, portion; /* pairs of tiles, and how many at a time */
} problem;

/* What a thread has: some channels of the result, in sixes, and of x, in vectors of 16; and room for their transforms. */
typedef struct {
    int64_t row, rows, padded;       /* the first of the result and how many; to a multiple of 16 */
    int64_t vector, vectors;         /* the first of x and how many */
    bf16 *pixels, *grads;            /* of 16 points, (chunks, portion, vectors, 16, 2) and (portion, padded, 2) */
    int64_t pixel_plane, grad_plane; /* from point to point */
} share;

/* Those of 16 channels of a pixel that are there; zero outside the image. */
INLINE floats channels_of(const bf16 *image, int64_t pixel, int64_t channels, __mmask16 there) {
    return pixel < 0 ? (floats){0} : widened(image + pixel * channels, there);
}

/* Where the two tiles of pair q begin in images of so many channels, and their size x size pixels from there on, or from one
   above and left of it. A tile after the last is outside of all images. */
INLINE void tiles_of(const problem *p, int64_t q, int64_t channels, int size, int64_t begin[2], int64_t pixels[2][POINTS]) {
    for (int t = 0; t < 2; t++) {
        place at = place_of(&p->of, 2 * q + t);
        int64_t back = size == 4;
        begin[t] = at.image * p->of.height * p->of.width * channels;
        pixels_at(&p->of, 2 * q + t < p->tiles ? at.y - back : p->of.height, at.x - back, size, pixels[t]);
    }
}

/* The transforms of pair q of all, k of the portion. */
INLINE void take_pixels(const problem *p, const share *s, int64_t q, int64_t k) {
    int64_t begin[2], pixels[2][POINTS];
    tiles_of(p, q, p->in, 4, begin, pixels);
    for (int64_t j = 0; j < s->vectors; j++) {
        int64_t channel = (s->vector + j) * LANES;
        __mmask16 there = lanes_from(channel, p->in);
        floats d[2][POINTS];
        for (int t = 0; t < 2; t++) {
            for (int i = 0; i < POINTS; i++) d[t][i] = channels_of(p->x + begin[t] + channel, pixels[t][i], p->in, there);
            transform_pixels(d[t]);
        }
        int64_t chunk = j / VECTORS, vectors = vectors_from(chunk * CHUNK, s->vectors * LANES);
        bf16 *to = s->pixels + (chunk * VECTORS * p->portion + k * vectors + j % VECTORS) * 2 * LANES;
        for (int i = 0; i < POINTS; i++) _mm512_store_si512(to + i * s->pixel_plane, paired(d[0][i], d[1][i]));
    }
}

/* And the sums of the gradients, added to (padded). */
INLINE void take_gradients(const problem *p, const share *s, int64_t q, int64_t k, float *sums) {
    int64_t begin[2], pixels[2][POINTS];
    tiles_of(p, q, p->out, 2, begin, pixels);
    for (int64_t c = 0; c < s->padded; c += LANES) {
        __mmask16 there = lanes_from(c, s->rows);
        floats d[2][POINTS], sum = (floats)_mm512_load_ps(sums + c);
        for (int t = 0; t < 2; t++) {
            floats y[4];
            for (int i = 0; i < 4; i++) y[i] = channels_of(p->g + begin[t] + s->row + c, pixels[t][i], p->out, there);
            sum += (y[0] + y[1]) + (y[2] + y[3]);
            transform_gradient(y, d[t]);
        }
        _mm512_store_ps(sums + c, (__m512)sum);
        bf16 *to = s->grads + (k * s->padded + c) * 2;
        for (int i = 0; i < POINTS; i++) _mm512_store_si512(to + i * s->grad_plane, paired(d[0][i], d[1][i]));
    }
}

/* The weights of 6 channels of the result from the m-th of the share on, and of a chunk of x's, of so many pairs, plus what
   was there unless these are the first. */
INLINE void add_pairs(const problem *p, const share *s, int64_t pairs, int64_t m, int64_t chunk, int vectors, int first) {
    float products[POINTS][GROUP * CHUNK] __attribute__((aligned(64)));
    for (int i = 0; i < POINTS; i++)
        multiply(s->grads + i * s->grad_plane + m * 2, 2, s->padded * 2,
                 s->pixels + i * s->pixel_plane + chunk * VECTORS * p->portion * 2 * LANES, pairs, products[i], vectors);
    for (int64_t r = 0; r < GROUP && m + r < s->rows; r++)
        for (int j = 0; j < vectors; j++) {
            int64_t channel = (s->vector + chunk * VECTORS + j) * LANES;
            __mmask16 there = lanes_from(channel, p->in);
            float *to = p->of_weight + (s->row + m + r) * TAPS * p->in + channel;
            floats found[POINTS], w[TAPS];
            for (int i = 0; i < POINTS; i++) found[i] = (floats)_mm512_load_ps(products[i] + (r * vectors + j) * LANES);
            transform_weights(found, w);
            for (int tap = 0; tap < TAPS; tap++) {
                if (!first) w[tap] += (floats)_mm512_maskz_loadu_ps(there, to + tap * p->in);
                _mm512_mask_storeu_ps(to + tap * p->in, there, (__m512)w[tap]);
            }
        }
}

static void work(const problem *p, const share *s, float *sums) {
    for (int64_t start = 0; start < p->pairs; start += p->portion) {
        int64_t count = p->pairs - start < p->portion ? p->pairs - start : p->portion;
        memset(sums, 0, s->padded * sizeof(float));
        for (int64_t k = 0; k < count; k++) {
            take_pixels(p, s, start + k, k);
            take_gradients(p, s, start + k, k, sums);
        }
        if (s->vector == 0)
            for (int64_t i = 0; i < s->rows; i++) p->of_bias[s->row + i] += sums[i];
        for (int64_t chunk = 0; chunk * VECTORS < s->vectors; chunk++)
            for (int64_t m = 0; m < s->rows; m += GROUP) {
#define ADD(vectors) add_pairs(p, s, count, m, chunk, vectors, start == 0)
                FOR_VECTORS(vectors_from(chunk * CHUNK, s->vectors * LANES), ADD);
            }
    }
}

/* Part `index` of `parts`, of which so many side by side share the channels of x; 1 without memory. */
static int do_part(const problem *p, int64_t index, int64_t parts, int64_t side) {
    int64_t sixes = (p->out + GROUP - 1) / GROUP, vectors = (p->in + LANES - 1) / LANES;
    int64_t across = index % side, down = index / side, rest = parts / side;
    share s = {.row = sixes * down / rest * GROUP, .vector = vectors * across / side};
    s.rows = sixes * (down + 1) / rest * GROUP - s.row;
    if (s.row + s.rows > p->out) s.rows = p->out - s.row;
    s.vectors = vectors * (across + 1) / side - s.vector;
    if (s.rows <= 0 || s.vectors <= 0) return 0;
    s.padded = (s.rows + LANES - 1) / LANES * LANES;
    s.pixel_plane = p->portion * s.vectors * 2 * LANES + APART;
    s.grad_plane = p->portion * s.padded * 2 + APART; /* 6 rows at a time may reach beyond the last, which is no matter */
    s.pixels = aligned_alloc(64, POINTS * s.pixel_plane * sizeof(bf16));
    s.grads = aligned_alloc(64, POINTS * s.grad_plane * sizeof(bf16));
    float *sums = aligned_alloc(64, s.padded * sizeof(float));
    int failed = !s.pixels || !s.grads || !sums;
    if (!failed) {
        FLUSH;
        work(p, &s, sums);
        RESTORE;
    }
    free(s.pixels);
    free(s.grads);
    free(sums);
    return failed;
}

/* x: (images, height, width, in), g: (images, height, width, out); of_weight: (out, 9, in), of_bias: (out). Returns 0, or 1
   without memory. */
int winograd_weights(const bf16 *x, const bf16 *g, float *of_weight, float *of_bias, int64_t images, int64_t height,
                     int64_t width, int64_t in, int64_t out, int threads) {
    problem p = {.x = x, .g = g, .of_weight = of_weight, .of = make_grid(height, width), .in = in, .out = out};
    p.tiles = images * p.of.rows * p.of.columns;
    p.pairs = (p.tiles + 1) / 2;
    p.portion = PORTION / (POINTS * (in + out) * 2 * (int64_t)sizeof(bf16));
    if (p.portion < 16) p.portion = 16;
    if (p.portion > p.pairs) p.portion = p.pairs;
    p.of_bias = calloc(out, sizeof(double));
    if (!p.of_bias) return 1;
    /* Threads read nothing that another has written: that takes longer than to transform the same pixels again. */
    int failed = 0, side = 1;
    while (threads % (2 * side) == 0 && 2 * side * side <= threads && in % (2 * side * CHUNK) == 0) side *= 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        if (do_part(&p, part, threads, side)) {
#pragma omp atomic write
            failed = 1;
        }
    for (int64_t c = 0; c < out; c++) of_bias[c] = (float)p.of_bias[c];
    free(p.of_bias);
    return failed;
}

#endif
