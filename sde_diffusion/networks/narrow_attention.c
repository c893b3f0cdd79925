/* Self-attention in heads of 8 channels (D), bfloat16 in and out, float within (but see narrow_attention_pairs.h).

   qkv is (images, tokens, 3, heads, D), the result (images, tokens, heads, D). With q scaled by 1 / sqrt(D), of each query
   P = exp(q k - L) over the keys, where L is the logarithm of the sum of exp(q k), and the result is P v. The weights P
   are never written: the derivative makes them anew from L (Dao et al. 2022, "FlashAttention", app. B). A thread takes
   whole heads, 16 queries or keys at a time. */

#include "tiles.h"
#include "vectors.h"

#include "pairs.h"

#define D 8
#define SAFE 80.0f /* logits to base 2 within this need no shift */

INLINE float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE floats at(const float *x) {
    floats values;
    memcpy(&values, x, sizeof values);
    return values;
}

INLINE void put(float *x, floats values) { memcpy(x, &values, sizeof values); }

/* One head of `from`, whose tokens are `stride` apart, times `factor`: as rows (tokens, D) and columns (D, padded). */
INLINE void unpack(const bf16 *from, int64_t stride, int64_t tokens, int64_t padded, float factor, float *rows,
                   float *columns) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) rows[t * D + d] = columns[d * padded + t] = widen(from[t * stride + d]) * factor;
}

INLINE void pack(const float *columns, int64_t padded, int64_t tokens, int64_t stride, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) to[t * stride + d] = narrow(columns[d * padded + t]);
}

/* The product of 16 columns with one row. */
INLINE floats product(const floats *columns, const float *row) {
    floats sum = columns[0] * row[0];
    for (int d = 1; d < D; d++) sum += columns[d] * row[d];
    return sum;
}

#ifndef HAVE_PAIRS
INLINE float product_of_eight(const bf16 *a, const bf16 *b) {
    float sum = 0.0f;
    for (int d = 0; d < D; d++) sum += widen(a[d]) * widen(b[d]);
    return sum;
}
#endif

INLINE float largest_norm(const bf16 *from, int64_t stride, int64_t tokens) {
    float largest = 0.0f;
    for (int64_t t = 0; t < tokens; t++) {
        float square = product_of_eight(from + t * stride, from + t * stride);
        largest = square > largest || square != square ? square : largest;
    }
    return sqrtf(largest);
}

/* Whether all logits are so small that exponentials need no shift, by Cauchy and Schwarz. */
INLINE int safe(const bf16 *qkv, int64_t stride, int64_t tokens, int64_t channels) {
    float reach = largest_norm(qkv, stride, tokens) * largest_norm(qkv + channels, stride, tokens);
    return reach * (LOG2E / sqrtf((float)D)) < SAFE;
}

INLINE void forward_head(const bf16 *qkv, bf16 *out, float *logs, int64_t tokens, int64_t padded, int64_t channels,
                         int shifted, float *room) {
    int64_t size = D * padded;
    float *q = room, *k = room + size, *v = room + 2 * size, *rows = room + 3 * size, *columns = room + 4 * size;
    unpack(qkv, 3 * channels, tokens, padded, LOG2E / sqrtf((float)D), rows, q);
    unpack(qkv + channels, 3 * channels, tokens, padded, 1.0f, k, columns);
    unpack(qkv + 2 * channels, 3 * channels, tokens, padded, 1.0f, v, columns);
    for (int64_t start = 0; start < tokens; start += LANES) {
        floats queries[D], sums[D], total = {0}, shift = {0};
        for (int d = 0; d < D; d++) queries[d] = at(q + d * padded + start), sums[d] = (floats){0};
        if (shifted) {
            shift = product(queries, k);
            for (int64_t t = 1; t < tokens; t++) {
                floats s = product(queries, k + t * D);
                shift = pick(s > shift, s, shift);
            }
        }
        for (int64_t t = 0; t < tokens; t++) {
            floats p = power(product(queries, k + t * D) - shift);
            total += p;
            for (int d = 0; d < D; d++) sums[d] += p * v[t * D + d];
        }
        for (int d = 0; d < D; d++) put(columns + d * padded + start, sums[d] / total);
        for (int i = 0; i < LANES; i++)
            if (logs && start + i < tokens) logs[start + i] = shift[i] + log2f(total[i]);
    }
    pack(columns, padded, tokens, channels, out);
}

/* sums[t] += weights[t] rows for every token t: (tokens, D), (tokens, 16) and (16, D). */
INLINE void spread(const float *weights, const float *rows, int64_t tokens, float *sums) {
    typedef float row __attribute__((vector_size(4 * D)));
    row kept[LANES];
    memcpy(kept, rows, sizeof kept);
    for (int64_t t = 0; t < tokens; t++) {
        row sum;
        memcpy(&sum, sums + t * D, sizeof sum);
        for (int i = 0; i < LANES; i++) sum += weights[t * LANES + i] * kept[i];
        memcpy(sums + t * D, &sum, sizeof sum);
    }
}

INLINE void backward_head(const bf16 *qkv, const bf16 *out, const bf16 *grad, const float *logs, bf16 *of_qkv,
                          int64_t tokens, int64_t padded, int64_t channels, float *room) {
    int64_t size = D * padded;
    float *q = room, *g = room + size, *of_q = room + 2 * size; /* columns, the rest are rows */
    float *q_rows = room + 3 * size, *k_rows = room + 4 * size, *v_rows = room + 5 * size, *g_rows = room + 6 * size;
    float *of_k = room + 7 * size, *of_v = room + 8 * size, *along = room + 9 * size, *log = along + padded;
    float *weights = log + padded, *slopes = weights + LANES * padded;
    unpack(qkv + channels, 3 * channels, tokens, padded, 1.0f, k_rows, q);
    unpack(qkv + 2 * channels, 3 * channels, tokens, padded, 1.0f, v_rows, q);
    unpack(qkv, 3 * channels, tokens, padded, LOG2E / sqrtf((float)D), q_rows, q);
    unpack(grad, channels, tokens, padded, 1.0f, g_rows, g);
    for (int64_t t = 0; t < tokens; t++) along[t] = product_of_eight(grad + t * channels, out + t * channels);
    memcpy(log, logs, tokens * sizeof(float));
    for (int64_t start = 0; start < tokens; start += LANES) {
        floats queries[D], grads[D], sums[D], shift = at(log + start), drift = at(along + start);
        for (int d = 0; d < D; d++)
            queries[d] = at(q + d * padded + start), grads[d] = at(g + d * padded + start), sums[d] = (floats){0};
        for (int64_t t = 0; t < tokens; t++) {
            floats p = power(product(queries, k_rows + t * D) - shift);
            floats slope = p * (product(grads, v_rows + t * D) - drift);
            for (int d = 0; d < D; d++) sums[d] += slope * k_rows[t * D + d];
            put(weights + t * LANES, p);
            put(slopes + t * LANES, slope);
        }
        for (int d = 0; d < D; d++) put(of_q + d * padded + start, sums[d] * (1.0f / sqrtf((float)D)));
        /* Beyond the last token the rows of q and g are zero. */
        spread(slopes, q_rows + start * D, tokens, of_k);
        spread(weights, g_rows + start * D, tokens, of_v);
    }
    pack(of_q, padded, tokens, 3 * channels, of_qkv);
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) {
            of_qkv[t * 3 * channels + channels + d] = narrow(of_k[t * D + d] * (1.0f / LOG2E));
            of_qkv[t * 3 * channels + 2 * channels + d] = narrow(of_v[t * D + d]);
        }
}

#ifdef HAVE_PAIRS
#include "narrow_attention_halves.h"
#include "narrow_attention_pairs.h"
#endif
#ifdef HAVE_TILES
#include "narrow_attention_tiles.h"
#endif

/* Memory for one head, zero; a multiple of a tile's row. */
INLINE void *make_room(int64_t bytes) {
    size_t size = (size_t)(bytes + 63) / 64 * 64;
    void *room = aligned_alloc(64, size);
    return room ? memset(room, 0, size) : NULL;
}

/* logs: (images, heads, tokens), a result, to base 2; may be NULL. Returns 0, or 1 without memory. */
int narrow_attention(const bf16 *qkv, bf16 *out, float *logs, int64_t images, int64_t tokens, int64_t heads, int threads) {
    int64_t padded = (tokens + 2 * LANES - 1) / (2 * LANES) * (2 * LANES), channels = heads * D;
    int failed = 0, tiles = tiles_allowed();
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t index = 0; index < images * heads; index++) {
        FLUSH;
        float *room = make_room(5 * D * padded * (int64_t)sizeof(float));
        if (room) {
            int64_t first = index / heads * tokens, head = index % heads * D;
            const bf16 *from = qkv + first * 3 * channels + head;
            bf16 *to = out + first * channels + head;
            float *log = logs ? logs + index * tokens : NULL;
            int shifted = !safe(from, 3 * channels, tokens, channels);
#ifdef HAVE_TILES
            if (tiles && !shifted) {
                TILES(FORWARD, forward_tiles(from, to, log, tokens, padded, channels, (bf16 *)room));
            } else
#endif
#ifdef HAVE_PAIRS
            if (!shifted)
                forward_pairs(from, to, log, tokens, padded, channels, (bf16 *)room);
            else
#endif
                forward_head(from, to, log, tokens, padded, channels, shifted, room);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(room);
        RESTORE;
    }
    (void)tiles;
    return failed;
}

/* of_qkv: like qkv, the derivative for the gradient grad of the result. */
int narrow_attention_backward(const bf16 *qkv, const bf16 *out, const bf16 *grad, const float *logs, bf16 *of_qkv,
                              int64_t images, int64_t tokens, int64_t heads, int threads) {
    int64_t padded = (tokens + 2 * LANES - 1) / (2 * LANES) * (2 * LANES), channels = heads * D;
    int failed = 0, tiles = tiles_allowed();
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t index = 0; index < images * heads; index++) {
        FLUSH;
        float *room = make_room((9 * D + 2 + 2 * LANES) * padded * (int64_t)sizeof(float));
        if (room) {
            int64_t first = index / heads * tokens, head = index % heads * D, at = first * channels + head;
            const bf16 *from = qkv + first * 3 * channels + head;
            bf16 *to = of_qkv + first * 3 * channels + head;
            const float *log = logs + index * tokens;
            int shifted = !safe(from, 3 * channels, tokens, channels); /* as for the result */
            (void)shifted;
#ifdef HAVE_TILES
            if (tiles && !shifted) {
                TILES(BACKWARD, backward_tiles(from, out + at, grad + at, log, to, tokens, padded, channels, (bf16 *)room));
            } else
#endif
#ifdef HAVE_PAIRS
            if (!shifted)
                backward_pairs(from, out + at, grad + at, log, to, tokens, padded, channels, (bf16 *)room);
            else
#endif
                backward_head(from, out + at, grad + at, log, to, tokens, padded, channels, room);
        } else {
#pragma omp atomic write
            failed = 1;
        }
        free(room);
        RESTORE;
    }
    (void)tiles;
    return failed;
}
