/* A 3x3 convolution (stride 1, zeros around the image) of images in bfloat16 whose channels come last, with fewer products:
   Winograd's F(2x2, 3x3) (Winograd 1980; Lavin & Gray 2016).

   Of 2x2 results, which depend on 4x4 pixels d, the convolution with g is A' ((G g G') (B' d B)) A, the product in the middle
   being of 16 numbers each; summed over channels it is 16 products of matrices, 4 products a result where there are 9
   otherwise. What goes into them is rounded to bfloat16, sums are in float. A thread takes so many tiles of 2x2 results at a
   time that what belongs to them stays in its cache. Each result is made in one order, whatever else is in the batch. */

#include "tiles.h"
#include "vectors.h"

#include "pairs.h"

#ifdef HAVE_PAIRS

#ifndef HAVE_TILES
#define tiles_allowed() 0
#endif

#define POINTS 16  /* of a tile's transform */
#define GROUP 6    /* tiles at a time in a product of matrices */
#define BLOCK_TILES 24
#define VECTORS 4  /* of 16 channels of the result at a time there */
#define CHUNK (VECTORS * LANES)

typedef struct {
    const bf16 *x;
    const float *bias; /* may be NULL */
    bf16 *result;
    int64_t height, width, in, out;
    int64_t padded;                      /* channels of x, to a multiple of 32 */
    int64_t rows, columns, tiles, block; /* of tiles: of an image, of all, and of a thread at a time, which 6 divides */
    const bf16 *filters;                 /* (chunks, 16 points, pairs of x's channels, vectors, 16, 2) */
} problem;

INLINE int vectors_of(const problem *p, int64_t chunk) {
    int64_t rest = p->out - chunk * CHUNK;
    return rest >= CHUNK ? VECTORS : (int)((rest + LANES - 1) / LANES);
}

/* B' d B, in place. */
INLINE void transform_pixels(floats d[POINTS]) {
    for (int i = 0; i < 4; i++) {
        floats a = d[i], b = d[4 + i], c = d[8 + i], e = d[12 + i];
        d[i] = a - c, d[4 + i] = b + c, d[8 + i] = c - b, d[12 + i] = b - e;
    }
    for (int i = 0; i < POINTS; i += 4) {
        floats a = d[i], b = d[i + 1], c = d[i + 2], e = d[i + 3];
        d[i] = a - c, d[i + 1] = b + c, d[i + 2] = c - b, d[i + 3] = b - e;
    }
}

/* G g G'. */
INLINE void transform_filter(const floats g[9], floats u[POINTS]) {
    floats lines[12]; /* (4, 3) */
    for (int i = 0; i < 3; i++) {
        floats outer = (g[i] + g[6 + i]) * 0.5f, inner = g[3 + i] * 0.5f;
        lines[i] = g[i], lines[3 + i] = outer + inner, lines[6 + i] = outer - inner, lines[9 + i] = g[6 + i];
    }
    for (int i = 0; i < 4; i++) {
        const floats *l = lines + 3 * i;
        floats outer = (l[0] + l[2]) * 0.5f, inner = l[1] * 0.5f;
        u[4 * i] = l[0], u[4 * i + 1] = outer + inner, u[4 * i + 2] = outer - inner, u[4 * i + 3] = l[2];
    }
}

/* A' m A: 2x2. */
INLINE void transform_result(const floats m[POINTS], floats y[4]) {
    floats lines[8]; /* (2, 4) */
    for (int i = 0; i < 4; i++) {
        lines[i] = m[i] + m[4 + i] + m[8 + i];
        lines[4 + i] = m[4 + i] - m[8 + i] - m[12 + i];
    }
    for (int i = 0; i < 2; i++) {
        const floats *l = lines + 4 * i;
        y[2 * i] = l[0] + l[1] + l[2];
        y[2 * i + 1] = l[1] - l[2] - l[3];
    }
}

/* Channels of numbers two by two: those of even place, and of odd. */
INLINE void apart(__m512i both, floats *even, floats *odd) {
    *even = (floats)((words)both << 16);
    *odd = (floats)((words)both & 0xffff0000);
}

/* Points of `count` tiles from `first` on: (16, block, padded); of those up to the next multiple of 6 nothing is read. */
static void take_pixels(const problem *p, int64_t first, int64_t count, bf16 *to) {
    int64_t plane = p->block * p->padded;
    for (int64_t t = 0; t < count; t++, to += p->padded) {
        int64_t tile = first + t, column = tile % p->columns, row = tile / p->columns % p->rows;
        const bf16 *image = p->x + tile / (p->rows * p->columns) * p->height * p->width * p->in;
        for (int64_t c = 0; c < p->padded; c += 2 * LANES) {
            int64_t n = p->in - c;
            __mmask32 there = n >= 2 * LANES ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1;
            floats even[POINTS], odd[POINTS];
            for (int i = 0; i < POINTS; i++) {
                int64_t y = 2 * row - 1 + i / 4, x = 2 * column - 1 + i % 4;
                __m512i both = _mm512_setzero_si512();
                if (y >= 0 && y < p->height && x >= 0 && x < p->width)
                    both = _mm512_maskz_loadu_epi16(there, image + (y * p->width + x) * p->in + c);
                apart(both, &even[i], &odd[i]);
            }
            transform_pixels(even);
            transform_pixels(odd);
            for (int i = 0; i < POINTS; i++) _mm512_store_si512(to + i * plane + c, paired(even[i], odd[i]));
        }
    }
}

/* Of 6 tiles and so many vectors of channels: (6, 16 vectors). */
INLINE void multiply(const bf16 *pixels, int64_t padded, const bf16 *filters, float *to, int vectors) {
    floats sums[GROUP][VECTORS];
    for (int i = 0; i < GROUP; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = (floats){0};
    for (int64_t c = 0; c < padded; c += 2, filters += vectors * 2 * LANES) {
        __m512i filter[VECTORS];
        for (int j = 0; j < vectors; j++) filter[j] = _mm512_load_si512(filters + j * 2 * LANES);
        for (int i = 0; i < GROUP; i++) {
            __m512i pair = two(pixels + i * padded + c);
            for (int j = 0; j < vectors; j++) sums[i][j] = add_products(sums[i][j], pair, filter[j]);
        }
    }
    for (int i = 0; i < GROUP; i++)
        for (int j = 0; j < vectors; j++) _mm512_store_ps(to + (i * vectors + j) * LANES, (__m512)sums[i][j]);
}

/* The results of `count` tiles from (16, block, 16 vectors) on. */
INLINE void give_results(const problem *p, int64_t first, int64_t count, int64_t chunk, int vectors, const float *from) {
    int64_t plane = p->block * vectors * LANES;
    for (int64_t t = 0; t < count; t++) {
        int64_t tile = first + t, column = tile % p->columns, row = tile / p->columns % p->rows;
        bf16 *image = p->result + tile / (p->rows * p->columns) * p->height * p->width * p->out;
        for (int j = 0; j < vectors; j++, from += LANES) {
            int64_t channel = chunk * CHUNK + j * LANES, n = p->out - channel;
            __mmask16 there = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
            floats m[POINTS], y[4], bias = {0};
            if (p->bias) bias = (floats)_mm512_maskz_loadu_ps(there, p->bias + channel);
            for (int i = 0; i < POINTS; i++) m[i] = (floats)_mm512_load_ps(from + i * plane);
            transform_result(m, y);
            for (int i = 0; i < 4; i++) {
                int64_t r = 2 * row + i / 2, c = 2 * column + i % 2;
                if (r < p->height && c < p->width)
                    _mm256_mask_storeu_epi16(image + (r * p->width + c) * p->out + channel, there,
                                             (__m256i)_mm512_cvtneps_pbh((__m512)(y[i] + bias)));
            }
        }
    }
}

INLINE void convolve_chunk(const problem *p, int64_t first, int64_t count, int64_t chunk, int vectors, const bf16 *pixels,
                           float *products) {
    int64_t size = p->padded * vectors * LANES; /* of a point's filters */
    const bf16 *filters = p->filters + chunk * POINTS * p->padded * CHUNK;
    for (int i = 0; i < POINTS; i++, filters += size)
        for (int64_t t = 0; t < count; t += GROUP)
            multiply(pixels + (i * p->block + t) * p->padded, p->padded, filters,
                     products + (i * p->block + t) * vectors * LANES, vectors);
    give_results(p, first, count, chunk, vectors, products);
}

static void convolve(const problem *p, int64_t first, bf16 *pixels, float *products) {
    int64_t count = p->tiles - first < p->block ? p->tiles - first : p->block;
    take_pixels(p, first, count, pixels);
    for (int64_t chunk = 0; chunk * CHUNK < p->out; chunk++) switch (vectors_of(p, chunk)) {
        case 1: convolve_chunk(p, first, count, chunk, 1, pixels, products); break;
        case 2: convolve_chunk(p, first, count, chunk, 2, pixels, products); break;
        case 3: convolve_chunk(p, first, count, chunk, 3, pixels, products); break;
        default: convolve_chunk(p, first, count, chunk, 4, pixels, products);
    }
}

/* 16 numbers, of which those from n on are zero. */
INLINE floats take(const void *from, int64_t place, int half, int64_t n) {
    if (n <= 0) return (floats){0};
    __mmask16 there = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
    if (!half) return (floats)_mm512_maskz_loadu_ps(there, (const float *)from + place);
    __m256i halves = _mm256_maskz_loadu_epi16(there, (const bf16 *)from + place);
    return (floats)((words)_mm512_cvtepu16_epi32(halves) << 16);
}

/* Where the filters of a point, of a pair of x's channels and 16 of the result are, and how far it is to the next point. */
INLINE bf16 *place_of(const problem *p, bf16 *filters, int64_t pair, int64_t channel, int64_t *stride) {
    int64_t chunk = channel / CHUNK, vectors = vectors_of(p, chunk);
    *stride = p->padded * vectors * LANES;
    return filters + chunk * POINTS * p->padded * CHUNK + (pair * vectors + channel % CHUNK / LANES) * 2 * LANES;
}

/* The filters of 32 channels of x from c on and 16 of the result from m on, of weights (out, 9, in), float or bfloat16; */
static void take_filters(const problem *p, const void *weights, int half, int64_t c, int64_t m, bf16 *filters) {
    words rows[POINTS][LANES] = {{{0}}};
    for (int64_t i = 0; i < LANES && m + i < p->out; i++) {
        floats low[9], high[9], a[POINTS], b[POINTS];
        for (int tap = 0; tap < 9; tap++) {
            int64_t place = ((m + i) * 9 + tap) * p->in + c;
            low[tap] = take(weights, place, half, p->in - c);
            high[tap] = take(weights, place + LANES, half, p->in - c - LANES);
        }
        transform_filter(low, a);
        transform_filter(high, b);
        for (int k = 0; k < POINTS; k++) rows[k][i] = (words)rounded(a[k], b[k]);
    }
    int64_t stride;
    bf16 *to = place_of(p, filters, c / 2, m, &stride);
    int64_t step = stride / p->padded * 2; /* from pair to pair */
    for (int k = 0; k < POINTS; k++) {
        words columns[LANES];
        transpose(rows[k], columns);
        for (int i = 0; i < LANES; i++) _mm512_store_si512(to + k * stride + i * step, (__m512i)columns[i]);
    }
}

/* or of weights (in, 9, out) with their taps in reverse, as the derivative by the image has them. */
static void take_reversed(const problem *p, const void *weights, int half, int64_t c, int64_t m, bf16 *filters) {
    for (int64_t pair = c / 2; pair < c / 2 + LANES; pair++) {
        floats first[9], second[9], a[POINTS], b[POINTS];
        for (int tap = 0; tap < 9; tap++) {
            int64_t place = (2 * pair * 9 + 8 - tap) * p->out + m, n = p->out - m;
            first[tap] = take(weights, place, half, 2 * pair < p->in ? n : 0);
            second[tap] = take(weights, place + 9 * p->out, half, 2 * pair + 1 < p->in ? n : 0);
        }
        transform_filter(first, a);
        transform_filter(second, b);
        int64_t stride;
        bf16 *to = place_of(p, filters, pair, m, &stride);
        for (int k = 0; k < POINTS; k++) _mm512_store_si512(to + k * stride, paired(a[k], b[k]));
    }
}

/* Whether this processor has what it takes, and no tiles, with which fewer products are no gain. */
int winograd_available(void) { return !tiles_allowed(); }

/* x: (images, height, width, in); weights: (out, 9, in), or if `reversed` (in, 9, out), float or if `half` bfloat16; bias:
   (out), may be NULL; result: (images, height, width, out). Returns 0, or 1 without memory. */
int winograd(const bf16 *x, const void *weights, const float *bias, bf16 *result, int64_t images, int64_t height, int64_t width,
             int64_t in, int64_t out, int half, int reversed, int threads) {
    problem p = {.x = x, .bias = bias, .result = result, .height = height, .width = width, .in = in, .out = out};
    p.padded = (in + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    p.rows = (height + 1) / 2;
    p.columns = (width + 1) / 2;
    p.tiles = images * p.rows * p.columns;
    p.block = BLOCK_TILES;
    while (p.block > GROUP && p.tiles < p.block * threads) p.block -= GROUP;
    int64_t blocks = (p.tiles + p.block - 1) / p.block, vectors = (out + LANES - 1) / LANES;
    bf16 *filters = aligned_alloc(64, POINTS * p.padded * vectors * LANES * sizeof(bf16));
    int failed = !filters;
    p.filters = filters;
#pragma omp parallel num_threads(threads) if (threads > 1)
    if (filters) {
        FLUSH;
        bf16 *pixels = aligned_alloc(64, POINTS * p.block * p.padded * sizeof(bf16));
        float *products = aligned_alloc(64, POINTS * p.block * CHUNK * sizeof(float));
        if (pixels) memset(pixels, 0, POINTS * p.block * p.padded * sizeof(bf16));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < vectors * (p.padded / (2 * LANES)); task++) {
            int64_t m = task % vectors * LANES, c = task / vectors * 2 * LANES;
            (reversed ? take_reversed : take_filters)(&p, weights, half, c, m, filters);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks; task++) {
            if (pixels && products)
                convolve(&p, task * p.block, pixels, products);
            else {
#pragma omp atomic write
                failed = 1;
            }
        }
        free(pixels);
        free(products);
        RESTORE;
    }
    free(filters);
    return failed;
}

#else

int winograd_available(void) { return 0; }

#endif
