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
#include "winograd.h"

#define MOST_TILES 24 /* of a thread at a time, which 6 divides */

typedef struct {
    const bf16 *x;
    const float *bias; /* may be NULL */
    bf16 *result;
    grid of;
    int64_t in, out, padded; /* channels of x and of the result; those of x to a multiple of 32 */
    int64_t vectors, parts;  /* channels of the result by 16, and in how many parts they are */
    bf16 *filters;           /* of each part (chunks, 16 points, pairs of x's channels, vectors, 16, 2) */
} problem;

/* Some channels of the result: from `first` on, up to `end`. */
typedef struct {
    int64_t first, end;
} part;

INLINE part get_part(const problem *p, int64_t index) {
    int64_t end = p->vectors * (index + 1) / p->parts * LANES;
    return (part){p->vectors * index / p->parts * LANES, end < p->out ? end : p->out};
}

/* Channels of numbers two by two: those of even place, and of odd. */
INLINE void apart(__m512i both, floats *even, floats *odd) {
    *even = (floats)((words)both << 16);
    *odd = (floats)((words)both & 0xffff0000);
}

/* Points of `count` tiles from `first` on: (16, block, padded). After them, to a multiple of 6, anything
   may be: each row of a product is by itself. */
static void take_pixels(const problem *p, int64_t first, int64_t count, bf16 *to) {
    int64_t plane = MOST_TILES * p->padded + APART;
    for (int64_t t = 0; t < count; t++, to += p->padded) {
        place at = place_of(&p->of, first + t);
        const bf16 *image = p->x + at.image * p->of.height * p->of.width * p->in;
        int64_t pixels[POINTS];
        pixels_at(&p->of, at.y - 1, at.x - 1, 4, pixels);
        for (int64_t c = 0; c < p->padded; c += 2 * LANES) {
            int64_t n = p->in - c;
            __mmask32 there = n >= 2 * LANES ? 0xffffffff : n <= 0 ? 0 : (1u << n) - 1;
            floats even[POINTS], odd[POINTS];
            for (int i = 0; i < POINTS; i++) {
                __m512i both = _mm512_setzero_si512();
                if (pixels[i] >= 0) both = _mm512_maskz_loadu_epi16(there, image + pixels[i] * p->in + c);
                apart(both, &even[i], &odd[i]);
            }
            transform_pixels(even);
            transform_pixels(odd);
            for (int i = 0; i < POINTS; i++) _mm512_store_si512(to + i * plane + c, paired(even[i], odd[i]));
        }
    }
}

/* The results of `count` tiles in the channels from `channel` on, from (16, block, 16 vectors). */
INLINE void give_results(const problem *p, int64_t first, int64_t count, int64_t channel, int vectors, const float *from) {
    int64_t plane = MOST_TILES * vectors * LANES + APART;
    for (int64_t t = 0; t < count; t++) {
        place at = place_of(&p->of, first + t);
        bf16 *image = p->result + at.image * p->of.height * p->of.width * p->out;
        int64_t pixels[4];
        pixels_at(&p->of, at.y, at.x, 2, pixels);
        for (int j = 0; j < vectors; j++, from += LANES) {
            int64_t c = channel + j * LANES;
            __mmask16 there = lanes_from(c, p->out);
            floats m[POINTS], y[4], bias = {0};
            if (p->bias) bias = (floats)_mm512_maskz_loadu_ps(there, p->bias + c);
            for (int i = 0; i < POINTS; i++) m[i] = (floats)_mm512_load_ps(from + i * plane);
            transform_result(m, y);
            for (int i = 0; i < 4; i++)
                if (pixels[i] >= 0)
                    _mm256_mask_storeu_epi16(image + pixels[i] * p->out + c, there,
                                             (__m256i)_mm512_cvtneps_pbh((__m512)(y[i] + bias)));
        }
    }
}

INLINE void convolve_chunk(const problem *p, int64_t first, int64_t count, int64_t channel, int vectors, const bf16 *pixels,
                           float *products) {
    int64_t size = p->padded * vectors * LANES; /* of a point's filters */
    const bf16 *filters = p->filters + channel * POINTS * p->padded;
    for (int i = 0; i < POINTS; i++, filters += size)
        for (int64_t t = 0; t < count; t += GROUP)
            multiply(pixels + i * (MOST_TILES * p->padded + APART) + t * p->padded, p->padded, 2, filters, p->padded / 2,
                     products + i * (MOST_TILES * vectors * LANES + APART) + t * vectors * LANES, vectors);
    give_results(p, first, count, channel, vectors, products);
}

static void convolve(const problem *p, part of, int64_t first, int64_t count, bf16 *pixels, float *products) {
    take_pixels(p, first, count, pixels);
    for (int64_t channel = of.first; channel < of.end; channel += CHUNK) {
#define CONVOLVE(vectors) convolve_chunk(p, first, count, channel, vectors, pixels, products)
        FOR_VECTORS(vectors_from(channel, of.end), CONVOLVE);
    }
}

/* 16 numbers, of which those from n on are zero. */
INLINE floats take(const void *from, int64_t place, int half, int64_t n) {
    __mmask16 there = lanes_from(0, n);
    if (half) return widened((const bf16 *)from + place, there);
    return (floats)_mm512_maskz_loadu_ps(there, (const float *)from + place);
}

/* Where the filters of a point, of a pair of x's channels and 16 of the result are, and how far it is to the next point. */
INLINE bf16 *filters_of(const problem *p, int64_t pair, int64_t channel, int64_t *stride) {
    int64_t index = 0;
    while (get_part(p, index).end <= channel) index++;
    part of = get_part(p, index);
    int64_t begin = of.first + (channel - of.first) / CHUNK * CHUNK, vectors = vectors_from(begin, of.end);
    *stride = p->padded * vectors * LANES;
    return p->filters + begin * POINTS * p->padded + (pair * vectors + (channel - begin) / LANES) * 2 * LANES;
}

/* The filters of 32 channels of x from c on and 16 of the result from m on, of weights (out, 9, in), float or bfloat16; */
static void take_filters(const problem *p, const void *weights, int half, int64_t c, int64_t m) {
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
    bf16 *to = filters_of(p, c / 2, m, &stride);
    int64_t step = stride / p->padded * 2; /* from pair to pair */
    for (int k = 0; k < POINTS; k++) {
        words columns[LANES];
        transpose(rows[k], columns);
        for (int i = 0; i < LANES; i++) _mm512_store_si512(to + k * stride + i * step, (__m512i)columns[i]);
    }
}

/* or of weights (in, 9, out) with their taps in reverse, as the derivative by the image has them. */
static void take_reversed(const problem *p, const void *weights, int half, int64_t c, int64_t m) {
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
        bf16 *to = filters_of(p, pair, m, &stride);
        for (int k = 0; k < POINTS; k++) _mm512_store_si512(to + k * stride, paired(a[k], b[k]));
    }
}

/* Whether this processor has what it takes, and no tiles, with which fewer products are no gain. */
int winograd_available(void) { return !tiles_allowed(); }

/* x: (images, height, width, in); weights: (out, 9, in), or if `reversed` (in, 9, out), float or if `half` bfloat16; bias:
   (out), may be NULL; result: (images, height, width, out). Returns 0, or 1 without memory. */
int winograd(const bf16 *x, const void *weights, const float *bias, bf16 *result, int64_t images, int64_t height, int64_t width,
             int64_t in, int64_t out, int half, int reversed, int threads) {
    problem p = {.x = x, .bias = bias, .result = result, .of = make_grid(height, width), .in = in, .out = out};
    p.padded = (in + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    int64_t tiles = images * p.of.rows * p.of.columns;
    int64_t groups = (tiles + GROUP - 1) / GROUP, blocks = p.padded / (2 * LANES);
    p.vectors = (out + LANES - 1) / LANES;
    /* What another thread has written takes long to come. Where there are many weights for few tiles, threads have channels
       of the result of their own, and their filters, and each transforms all pixels; else they have tiles of their own. */
    p.parts = 1;
    if (tiles <= 4 * out)
        for (int64_t parts = 2; parts <= threads && 2 * parts <= p.vectors; parts++)
            if (threads % parts == 0) p.parts = parts;
    int64_t side = threads / p.parts; /* threads that share a part */
    p.filters = aligned_alloc(64, POINTS * p.padded * p.vectors * LANES * sizeof(bf16));
    int failed = !p.filters;
#pragma omp parallel num_threads(threads) if (threads > 1)
    if (p.filters) {
        FLUSH;
        bf16 *pixels = aligned_alloc(64, POINTS * (MOST_TILES * p.padded + APART) * sizeof(bf16));
        float *products = aligned_alloc(64, POINTS * (MOST_TILES * CHUNK + APART) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < p.vectors * blocks; task++) {
            int64_t m = task / blocks * LANES, c = task % blocks * 2 * LANES;
            (reversed ? take_reversed : take_filters)(&p, weights, half, c, m);
        }
#pragma omp for schedule(static)
        for (int64_t share = 0; share < threads; share++) {
            int64_t first = groups * (share % side) / side * GROUP, end = groups * (share % side + 1) / side * GROUP;
            part of = get_part(&p, share / side);
            if (end > tiles) end = tiles;
            if (pixels && products) {
                for (; first < end; first += MOST_TILES)
                    convolve(&p, of, first, end - first < MOST_TILES ? end - first : MOST_TILES, pixels, products);
            } else {
#pragma omp atomic write
                failed = 1;
            }
        }
        free(pixels);
        free(products);
        RESTORE;
    }
    free(p.filters);
    return failed;
}

#else

int winograd_available(void) { return 0; }

#endif
