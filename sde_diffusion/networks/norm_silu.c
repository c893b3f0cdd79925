/* GroupNorm, a scale and shift per image and channel, SiLU and dropout, for images in bfloat16 whose channels come last.

   An image x is (pixels, channels); each channel may have an offset s, and x + s is what is normalised. y = scale x + shift,
   with scale = weight / deviation of the group and shift = bias - (mean - s) scale; the result is y, or y / (1 + exp(-y)). A
   thread takes whole images, 32 channels of all pixels at a time. Sums are made in float over 128 pixels, and those added in
   double. */

#include "vectors.h"

#include "pairs.h"

#define BLOCK 32
#define PORTION 128
#define OFFSET(c) (offset ? offset[row + (c)] : 0.0)

/* n <= LANES values; the lanes after them are zero. */
INLINE floats load(const bf16 *x, int n) { return (floats)(load_halves(x, n) << 16); }

/* To the nearest, ties to even; NaN stays NaN. */
INLINE void store(bf16 *x, floats values, int n) {
#ifdef HAVE_PAIRS
    __m256bh part = _mm512_cvtneps_pbh((__m512)values);
#else
    words bits = (words)values;
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    masks nan = values != values;
    rounded = (rounded & ~(words)nan) | (0x7fc0 & (words)nan);
    halves part = __builtin_convertvector(rounded, halves);
#endif
    memcpy(x, &part, n * sizeof(bf16));
}

INLINE floats load_floats(const float *x, int n) {
    floats values = {0};
    memcpy(&values, x, n * sizeof(float));
    return values;
}

/* 1 / (1 + exp(-y)) to 3e-6, relative; NaN stays NaN. */
INLINE floats sigmoid(floats y) {
    const floats most = (floats){0} + 125.0f;
    floats z = y * -LOG2E; /* 2^z = exp(-y) */
    return inverse(fair_power(pick(z > most, most, z)) + 1.0f);
}

/* WHAT(c, n, vectors): for n channels from c on, in so many vectors, the numbers constant but for the last few channels. */
#define IN_BLOCKS(channels, WHAT)                                    \
    do {                                                             \
        int64_t c = 0;                                               \
        for (; c + BLOCK <= (channels); c += BLOCK) WHAT(c, BLOCK, 2); \
        for (; c + LANES <= (channels); c += LANES) WHAT(c, LANES, 1); \
        if (c < (channels)) WHAT(c, (int)((channels) - c), 1);       \
    } while (0)
#define EACH for (int j = 0, k = n / vectors; j < vectors; j++)
#define AT (p * channels + j * LANES)

INLINE void add_to(double *sums, const floats *part, int n) {
    for (int i = 0; i < n; i++) sums[i] += part[i / LANES][i % LANES];
}

INLINE void moments(const bf16 *x, int64_t pixels, int64_t channels, double *first, double *second, int n, int vectors) {
    for (int64_t start = 0; start < pixels; start += PORTION) {
        floats a[2] = {{0}}, b[2] = {{0}};
        for (int64_t p = start; p < pixels && p < start + PORTION; p++)
            EACH {
                floats v = load(x + AT, k);
                a[j] += v;
                b[j] += v * v;
            }
        add_to(first, a, n);
        add_to(second, b, n);
    }
}

/* What stays, times `factor`, and what becomes zero: where a number made of the place of an element is below `least`. */
typedef struct {
    uint32_t seed[2], least;
    float factor;
} drop;

/* Numbers of 32 bits that look independent of each other, of whole numbers x (Mueller 2017-2018, "hash prospector"). */
INLINE words mixed(words x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* The factors of 16 elements from place `first` on. */
INLINE floats kept(const drop *d, uint32_t first) {
    const words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    words bits = mixed(mixed(lanes + first + d->seed[0]) ^ d->seed[1]);
    return (floats)((words)((floats){0} + d->factor) & (words)(bits >= d->least));
}

/* With slope not NULL also the derivative of the result by y; with d not NULL with dropout, x being at place `first`. */
INLINE void apply(const bf16 *x, int64_t pixels, int64_t channels, const float *scale, const float *shift, bf16 *out,
                  bf16 *slope, int silu, const drop *d, uint32_t first, int n, int vectors) {
    floats s[2], t[2];
    EACH s[j] = load_floats(scale + j * LANES, k), t[j] = load_floats(shift + j * LANES, k);
    for (int64_t p = 0; p < pixels; p++)
        EACH {
            floats y = load(x + AT, k) * s[j] + t[j];
            if (silu) {
                floats gate = sigmoid(y);
                y *= gate;
                floats rise = gate + y * (1.0f - gate);
                if (d) {
                    floats factors = kept(d, first + (uint32_t)AT);
                    y *= factors;
                    rise *= factors;
                }
                if (slope) store(slope + AT, rise, k);
            }
            store(out + AT, y, k);
        }
}

INLINE void correlations(const bf16 *g, const bf16 *slope, const bf16 *x, int64_t pixels, int64_t channels, double *sum,
                         double *along, int n, int vectors) {
    for (int64_t start = 0; start < pixels; start += PORTION) {
        floats a[2] = {{0}}, b[2] = {{0}};
        for (int64_t p = start; p < pixels && p < start + PORTION; p++)
            EACH {
                floats v = load(g + AT, k);
                if (slope) v *= load(slope + AT, k);
                a[j] += v;
                b[j] += v * load(x + AT, k);
            }
        add_to(sum, a, n);
        add_to(along, b, n);
    }
}

INLINE void combine(const bf16 *g, const bf16 *slope, const bf16 *x, int64_t pixels, int64_t channels, const float *of_g,
                    const float *of_x, const float *constant, bf16 *out, int n, int vectors) {
    floats a[2], b[2], d[2];
    EACH a[j] = load_floats(of_g + j * LANES, k), b[j] = load_floats(of_x + j * LANES, k),
         d[j] = load_floats(constant + j * LANES, k);
    for (int64_t p = 0; p < pixels; p++)
        EACH {
            floats v = load(g + AT, k);
            if (slope) v *= load(slope + AT, k);
            store(out + AT, v * a[j] + load(x + AT, k) * b[j] + d[j], k);
        }
}

/* x, out, slope: (images, pixels, channels), slope may be NULL; the others (images, channels), offset may be NULL. Results
   are out, slope, and mean and rate, the mean and 1 / deviation of each channel's group, and middle, its own mean. dropout: a probability, of which what is dropped
   is a function of the seed and the place; only with silu and slope. Returns 0, or 1 without memory. */
int norm_silu(const bf16 *x, const float *weight, const float *bias, const float *offset, bf16 *out, bf16 *slope,
              float *mean, float *rate, float *middle, int64_t images, int64_t pixels, int64_t channels, int64_t groups, double eps, int silu, double dropout,
              int64_t seed, int threads) {
    int64_t width = channels / groups;
    const drop dropped = {{(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32)}, (uint32_t)(dropout * 4294967296.0),
                          (float)(1.0 / (1.0 - dropout))};
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < images; image++) {
        FLUSH;
        double *sums = calloc(2 * channels, sizeof(double));
        float *maps = malloc(2 * channels * sizeof(float));
        if (sums && maps) {
            double *first = sums, *second = sums + channels;
            float *scale = maps, *shift = maps + channels;
            int64_t row = image * channels;
            const bf16 *from = x + row * pixels;
            bf16 *to = out + row * pixels, *slopes = slope ? slope + row * pixels : NULL;
#define MOMENTS(c, n, vectors) moments(from + c, pixels, channels, first + c, second + c, n, vectors)
            IN_BLOCKS(channels, MOMENTS);
            for (int64_t c = 0; c < channels; c++) {
                double s = OFFSET(c);
                second[c] += s * (2.0 * first[c] + pixels * s);
                first[c] += pixels * s;
                middle[row + c] = (float)(first[c] / pixels);
            }
            for (int64_t start = 0; start < channels; start += width) {
                double m = 0.0, v = 0.0;
                for (int64_t c = start; c < start + width; c++) m += first[c], v += second[c];
                m /= (double)(width * pixels);
                v = v / (double)(width * pixels) - m * m;
                double r = 1.0 / sqrt((v < 0.0 ? 0.0 : v) + eps);
                for (int64_t c = start; c < start + width; c++) {
                    mean[row + c] = (float)m;
                    rate[row + c] = (float)r;
                    scale[c] = (float)(weight[row + c] * r);
                    shift[c] = (float)(bias[row + c] - (m - OFFSET(c)) * weight[row + c] * r);
                }
            }
            uint32_t place = (uint32_t)(row * pixels);
#define TO(c, slopes, silu, d, n, vectors) \
    apply(from + c, pixels, channels, scale + c, shift + c, to + c, slopes, silu, d, place + (uint32_t)(c), n, vectors)
#define DROPPED(c, n, vectors) TO(c, slopes + c, 1, &dropped, n, vectors)
#define SLOPED(c, n, vectors) TO(c, slopes + c, 1, NULL, n, vectors)
#define SILU(c, n, vectors) TO(c, NULL, 1, NULL, n, vectors)
#define AFFINE(c, n, vectors) TO(c, NULL, 0, NULL, n, vectors)
            if (silu && slopes && dropout > 0.0)
                IN_BLOCKS(channels, DROPPED);
            else if (silu && slopes)
                IN_BLOCKS(channels, SLOPED);
            else if (silu)
                IN_BLOCKS(channels, SILU);
            else
                IN_BLOCKS(channels, AFFINE);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(sums);
        free(maps);
        RESTORE;
    }
    return failed;
}

/* The derivatives, for the gradient g of the result: of_x like x, of_weight, of_bias and of_offset (images, channels), the
   last NULL where offset is. */
int norm_silu_backward(const bf16 *g, const bf16 *slope, const bf16 *x, const float *weight, const float *offset,
                       const float *mean, const float *rate, const float *middle, bf16 *of_x, float *of_weight,
                       float *of_bias, float *of_offset, int64_t images, int64_t pixels, int64_t channels, int64_t groups,
                       int threads) {
    int64_t width = channels / groups;
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < images; image++) {
        FLUSH;
        double *sums = calloc(2 * channels, sizeof(double));
        float *maps = malloc(3 * channels * sizeof(float));
        if (sums && maps) {
            double *sum = sums, *along = sums + channels;
            float *a = maps, *b = maps + channels, *d = maps + 2 * channels;
            int64_t row = image * channels;
            const bf16 *from = x + row * pixels, *grads = g + row * pixels, *slopes = slope ? slope + row * pixels : NULL;
            bf16 *to = of_x + row * pixels;
#define SLOPED_SUMS(c, n, vectors) \
    correlations(grads + c, slopes + c, from + c, pixels, channels, sum + c, along + c, n, vectors)
#define SUMS(c, n, vectors) correlations(grads + c, NULL, from + c, pixels, channels, sum + c, along + c, n, vectors)
            if (slopes)
                IN_BLOCKS(channels, SLOPED_SUMS);
            else
                IN_BLOCKS(channels, SUMS);
            /* d/dx = rate (w g - <w g> - xhat <w g xhat>), the means < > being over the group. */
            for (int64_t start = 0; start < channels; start += width) {
                double m = mean[row + start], r = rate[row + start], steady = 0.0, tilt = 0.0;
                for (int64_t c = start; c < start + width; c++) {
                    double hat = (along[c] - (m - OFFSET(c)) * sum[c]) * r;
                    of_weight[row + c] = (float)hat;
                    of_bias[row + c] = (float)sum[c];
                    steady += weight[row + c] * sum[c];
                    tilt += weight[row + c] * hat;
                }
                steady *= r / (double)(width * pixels);
                tilt *= r * r / (double)(width * pixels);
                for (int64_t c = start; c < start + width; c++) {
                    a[c] = (float)(weight[row + c] * r);
                    b[c] = (float)-tilt;
                    d[c] = (float)((m - OFFSET(c)) * tilt - steady);
                    if (of_offset)
                        of_offset[row + c] = (float)(weight[row + c] * r * sum[c] -
                                                     pixels * ((middle[row + c] - m) * tilt + steady));
                }
            }
#define SLOPED_X(c, n, vectors) \
    combine(grads + c, slopes + c, from + c, pixels, channels, a + c, b + c, d + c, to + c, n, vectors)
#define PLAIN_X(c, n, vectors) \
    combine(grads + c, NULL, from + c, pixels, channels, a + c, b + c, d + c, to + c, n, vectors)
            if (slopes)
                IN_BLOCKS(channels, SLOPED_X);
            else
                IN_BLOCKS(channels, PLAIN_X);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(sums);
        free(maps);
        RESTORE;
    }
    return failed;
}
