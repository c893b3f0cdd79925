/* The expected noise of pixels with logits of their grey levels, where cells are narrow against the noise: cells.py says
   what is computed, `series` there with which approximations. 16 pixels at a time, one sample a thread.

   Of a cell with its middle at m (in standard deviations of the noise) the logarithm of its mass is, but for what all
   share, c1 m^2 + c2 m^4 + c3 m^6 - m^2 / 2, and the mean of the noise in it minus the derivative of that by m; beyond
   m^2 = 36 the higher terms stay what they are at 36. */

#include "vectors.h"

#define REACH 36.0f

INLINE floats load(const float *from, int64_t count) {
    floats values = {0};
    if (count == LANES)
        memcpy(&values, from, sizeof values);
    else
        memcpy(&values, from, count * sizeof(float));
    return values;
}

INLINE void store(float *to, floats values, int64_t count) {
    if (count == LANES)
        memcpy(to, &values, sizeof values);
    else
        memcpy(to, &values, count * sizeof(float));
}

typedef struct {
    double c1, c2, c3, width, precision; /* the latter 1 / s */
} sample;

/* Middles of level k's cells: from that of the level next to the pixel on, so that they have all digits where it counts. */
typedef struct {
    floats nearest, offset; /* the level, and its middle */
} place;

INLINE place find(const double *y, const sample *now, int64_t levels, int64_t count) {
    place found = {{0}, {0}};
    for (int64_t i = 0; i < count; i++) {
        double level = floor((y[i] + 1.0) * 0.5 * levels);
        level = level > levels - 1 ? levels - 1 : level > 0 ? level : 0; /* of NaN 0 */
        found.nearest[i] = level;
        found.offset[i] = ((2.0 * level + 1.0) / levels - 1.0 - y[i]) * now->precision;
    }
    return found;
}

/* of_logits and of_y, the derivatives, may be NULL. terms: room for `levels` vectors. */
INLINE void some_pixels(const float *logits, int64_t step, const double *y, const sample *now, int64_t levels, int64_t count,
                        float *noise, float *of_logits, int64_t of_step, float *of_y, floats *terms) {
    const float c1 = now->c1, c2 = now->c2, c3 = now->c3, width = now->width, slope = 1.0 - 2.0 * now->c1;
    const floats reach = (floats){0} + REACH;
    place at = find(y, now, levels, count);
    floats largest = {0}, total = {0}, distance = {0}, bend = {0}, within = {0}, between = {0};
    for (int64_t k = 0; k < levels; k++) {
        floats m = at.offset + ((float)k - at.nearest) * width, square = m * m, q = pick(square > REACH, reach, square);
        floats term = load(logits + k * step, count) + ((c3 * q + c2) * q + c1) * q - 0.5f * square;
        largest = k ? pick(term > largest, term, largest) : term;
        terms[k] = term;
    }
    /* The mean in a cell is slope m - (6 c3 q + 4 c2) q m. */
    for (int64_t k = 0; k < levels; k++) {
        floats steps = ((float)k - at.nearest) * width, m = at.offset + steps, square = m * m;
        floats q = pick(square > REACH, reach, square), p = power((terms[k] - largest) * LOG2E);
        total += p;
        distance += p * steps;
        bend += p * ((6.0f * c3 * q + 4.0f * c2) * q * m);
        terms[k] = p;
    }
    floats share = 1.0f / total;
    distance *= share;
    bend *= share;
    store(noise, bend - slope * (at.offset + distance), count);
    if (!of_logits) return;
    for (int64_t k = 0; k < levels; k++) {
        floats steps = ((float)k - at.nearest) * width, m = at.offset + steps, square = m * m;
        floats q = pick(square > REACH, reach, square), p = terms[k] * share;
        floats spread = slope * (steps - distance) - ((6.0f * c3 * q + 4.0f * c2) * q * m - bend);
        store(of_logits + k * of_step, -(p * spread), count);
        if (of_y) {
            floats inside = (30.0f * c3 * q + 12.0f * c2) * q, beyond = (6.0f * c3 * q + 4.0f * c2) * q;
            within += p * (slope - pick(square < REACH, inside, beyond));
            between += p * spread * spread;
        }
    }
    if (of_y) store(of_y, (within - between) * (float)now->precision, count);
}

/* Of the samples `rows`, `count` of them: logits and of_logits at image * strides[0] + channel * strides[1] + level *
   strides[2] + pixel, and the same with strides[3..5]; y, noise and of_y (images, channels, pixels). Returns 0, or 1
   without memory. */
int narrow_cells(const float *logits, const double *y, const int64_t *rows, const sample *samples, float *noise,
                 float *of_logits, float *of_y, const int64_t *strides, int64_t count, int64_t channels, int64_t levels,
                 int64_t pixels, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        FLUSH;
        floats *terms = aligned_alloc(64, levels * sizeof(floats));
        if (terms) {
            for (int64_t c = 0; c < channels; c++)
                for (int64_t p = 0; p < pixels; p += LANES) {
                    int64_t here = (rows[i] * channels + c) * pixels + p, some = pixels - p < LANES ? pixels - p : LANES;
                    const float *from = logits + rows[i] * strides[0] + c * strides[1] + p;
                    float *to = of_logits ? of_logits + rows[i] * strides[3] + c * strides[4] + p : NULL;
                    some_pixels(from, strides[2], y + here, samples + i, levels, some, noise + here, to, strides[5],
                                of_y ? of_y + here : NULL, terms);
                }
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(terms);
        RESTORE;
    }
    return failed;
}
