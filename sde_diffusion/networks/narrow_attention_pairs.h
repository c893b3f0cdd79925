/* Heads of narrow_attention.c by products of pairs in bfloat16 (AVX-512 BF16). Weights and their slopes are rounded to
   bfloat16 on their way from one product to the next, as with tiles. */

/* The products of one key with 32 queries, or of its value with their gradients. */
INLINE void with_queries(const bf16 *key, const __m512i queries[D / 2][2], floats to[2]) {
    to[0] = to[1] = (floats){0};
    for (int c = 0; c < D / 2; c++) {
        __m512i pair = two(key + 2 * c);
        for (int h = 0; h < 2; h++) to[h] = add_products(to[h], pair, queries[c][h]);
    }
}

/* 32 queries, a pair of channels each, of those packed by as_pairs_of_channels. */
INLINE void load_queries(const bf16 *from, __m512i to[D / 2][2]) {
    for (int c = 0; c < D / 2; c++)
        for (int h = 0; h < 2; h++) to[c][h] = _mm512_load_si512(from + h * BLOCK * WIDE + c * 2 * BLOCK);
}

/* Two keys, of which the second may be missing, for 32 queries: adds to the sums of weights, and of weighted values. */
INLINE void forward_pair(const bf16 *k, const bf16 *v, const __m512i queries[D / 2][2], floats total[2], floats sums[D][2],
                         int both) {
    const float scale = LOG2E / sqrtf((float)D);
    floats even[2], odd[2] = {{0}, {0}};
    __m512i weights[2];
    with_queries(k, queries, even);
    if (both) with_queries(k + WIDE, queries, odd);
    for (int h = 0; h < 2; h++) {
        even[h] = coarse_power(even[h] * scale);
        if (both) odd[h] = coarse_power(odd[h] * scale);
        total[h] += even[h] + odd[h];
        weights[h] = paired(even[h], odd[h]);
    }
    for (int d = 0; d < D; d++) {
        __m512i value = two(v + 2 * d);
        for (int h = 0; h < 2; h++) sums[d][h] = add_products(sums[d][h], value, weights[h]);
    }
}

/* Up to 32 queries of (8, 2, 16) as rows that are `stride` apart. */
INLINE void write_queries(const floats columns[D][2], int64_t count, int64_t stride, bf16 *to) {
    bf16 halves[D][2 * LANES] __attribute__((aligned(64)));
    for (int d = 0; d < D; d++) _mm512_store_si512(halves[d], rounded(columns[d][0], columns[d][1]));
    for (int64_t i = 0; i < count && i < 2 * LANES; i++)
        for (int d = 0; d < D; d++) to[i * stride + d] = halves[d][i];
}

/* room: 40 padded numbers, zero. */
INLINE void forward_pairs(const bf16 *qkv, bf16 *out, float *logs, int64_t tokens, int64_t padded, int64_t channels,
                          bf16 *room) {
    bf16 *q = room, *k = q + WIDE * padded, *v = k + WIDE * padded;
    as_pairs_of_channels(qkv, 3 * channels, tokens, q);
    as_rows(qkv + channels, 3 * channels, tokens, k);
    as_pairs_of_tokens(qkv + 2 * channels, 3 * channels, tokens, v);
    for (int64_t start = 0; start < tokens; start += 2 * LANES) {
        __m512i queries[D / 2][2];
        floats total[2] = {{0}, {0}}, sums[D][2] = {{{0}}};
        load_queries(q + start * WIDE, queries);
        int64_t t = 0;
        for (; t + 1 < tokens; t += 2) forward_pair(k + t * WIDE, v + t * D, queries, total, sums, 1);
        if (t < tokens) forward_pair(k + t * WIDE, v + t * D, queries, total, sums, 0);
        for (int d = 0; d < D; d++)
            for (int h = 0; h < 2; h++) sums[d][h] /= total[h];
        write_queries(sums, tokens - start, channels, out + start * channels);
        for (int64_t i = 0; logs && i < 2 * LANES && start + i < tokens; i++)
            logs[start + i] = log2f(total[i / LANES][i % LANES]);
    }
}

/* Groups of four tokens, (tokens / 4, 8, 4). */
INLINE void as_fours_of_tokens(const bf16 *from, int64_t stride, int64_t tokens, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) to[t / 4 * 4 * D + d * 4 + t % 4] = from[t * stride + d];
}

/* sums (16 keys, 16) += the products of (16 keys, 32 queries) with so many queries of as_fours_of_tokens. Lanes 2 d and 2 d
   + 1 make up channel d. */
INLINE void over_queries(bf16 weights[BLOCK][2 * LANES], const bf16 *queries, float *sums) {
    floats sum[BLOCK];
    for (int t = 0; t < BLOCK; t++) sum[t] = at(sums + t * LANES);
    for (int i = 0; i < 2 * LANES; i += 4) {
        __m512i group = _mm512_load_si512(queries + i * D);
        for (int t = 0; t < BLOCK; t++) sum[t] = add_products(sum[t], four(weights[t] + i), group);
    }
    for (int t = 0; t < BLOCK; t++) put(sums + t * LANES, sum[t]);
}

/* The 16 lanes, which make up 8 channels, times `factor`. */
INLINE void write_key(const float *sums, float factor, bf16 *to) {
    __m512 pairs = _mm512_load_ps(sums), swapped = _mm512_permute_ps(pairs, 0xb1);
    const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    floats all = (floats)_mm512_permutexvar_ps(order, _mm512_add_ps(pairs, swapped)) * factor;
    _mm_storeu_si128((__m128i *)to, (__m128i)_mm256_cvtneps_pbh(_mm512_castps512_ps256((__m512)all)));
}

/* sums (8, 2, 16 queries) += the products of 16 keys, as as_pairs_of_tokens has them, with their slopes. */
INLINE void over_keys(__m512i slopes[BLOCK / 2][2], const bf16 *keys, float *sums) {
    floats sum[2 * D];
    for (int i = 0; i < 2 * D; i++) sum[i] = at(sums + i * LANES);
    for (int t = 0; t < BLOCK / 2; t++)
        for (int d = 0; d < D; d++) {
            __m512i key = two(keys + t * 2 * D + 2 * d);
            for (int h = 0; h < 2; h++) sum[2 * d + h] = add_products(sum[2 * d + h], key, slopes[t][h]);
        }
    for (int i = 0; i < 2 * D; i++) put(sums + i * LANES, sum[i]);
}

/* room: 108 padded numbers, zero. */
INLINE void backward_pairs(const bf16 *qkv, const bf16 *out, const bf16 *grad, const float *logs, bf16 *of_qkv,
                           int64_t tokens, int64_t padded, int64_t channels, bf16 *room) {
    int64_t wide = WIDE * padded, size = D * padded, step = 3 * channels;
    bf16 *k = room, *v = k + wide, *q = v + wide, *g = q + wide; /* as the products with keys and values take them */
    bf16 *k_pairs = g + wide, *q_fours = k_pairs + size, *g_fours = q_fours + size;
    float *of_q = (float *)(g_fours + size), *log = of_q + size, *along = log + padded;
    bf16 weights[BLOCK][2 * LANES] __attribute__((aligned(64))), slopes[BLOCK][2 * LANES] __attribute__((aligned(64)));
    __m512i slope_pairs[BLOCK / 2][2];
    float of_k[BLOCK * LANES] __attribute__((aligned(64))), of_v[BLOCK * LANES] __attribute__((aligned(64)));
    const float root = 1.0f / sqrtf((float)D), scale = LOG2E * root;
    as_rows(qkv + channels, step, tokens, k);
    as_rows(qkv + 2 * channels, step, tokens, v);
    as_pairs_of_channels(qkv, step, tokens, q);
    as_pairs_of_channels(grad, channels, tokens, g);
    as_pairs_of_tokens(qkv + channels, step, tokens, k_pairs);
    as_fours_of_tokens(qkv, step, tokens, q_fours);
    as_fours_of_tokens(grad, channels, tokens, g_fours);
    for (int64_t t = 0; t < tokens; t++) along[t] = product_of_eight(grad + t * channels, out + t * channels);
    memcpy(log, logs, tokens * sizeof(float));
    for (int64_t first = 0; first < tokens; first += BLOCK) {
        memset(of_k, 0, sizeof of_k);
        memset(of_v, 0, sizeof of_v);
        for (int64_t start = 0; start < tokens; start += 2 * LANES) {
            __m512i queries[D / 2][2], grads[D / 2][2];
            load_queries(q + start * WIDE, queries);
            load_queries(g + start * WIDE, grads);
            for (int t = 0; t < BLOCK; t += 2) {
                floats p[2][2] = {{{0}}}, slope[2][2] = {{{0}}}; /* keys, queries */
                for (int i = 0; i < 2; i++) {
                    if (first + t + i < tokens) {
                        with_queries(k + (first + t + i) * WIDE, queries, p[i]);
                        with_queries(v + (first + t + i) * WIDE, grads, slope[i]);
                        for (int h = 0; h < 2; h++) {
                            p[i][h] = coarse_power(p[i][h] * scale - at(log + start + h * LANES));
                            slope[i][h] = p[i][h] * (slope[i][h] - at(along + start + h * LANES));
                        }
                    }
                    _mm512_store_si512(weights[t + i], rounded(p[i][0], p[i][1]));
                    _mm512_store_si512(slopes[t + i], rounded(slope[i][0], slope[i][1]));
                }
                for (int h = 0; h < 2; h++) slope_pairs[t / 2][h] = paired(slope[0][h], slope[1][h]);
            }
            over_keys(slope_pairs, k_pairs + first * D, of_q + start * D);
            over_queries(slopes, q_fours + start * D, of_k);
            over_queries(weights, g_fours + start * D, of_v);
        }
        for (int64_t t = 0; t < BLOCK && first + t < tokens; t++) {
            bf16 *to = of_qkv + (first + t) * step + channels;
            write_key(of_k + t * LANES, root, to);
            write_key(of_v + t * LANES, 1.0f, to + channels);
        }
    }
    for (int64_t start = 0; start < tokens; start += 2 * LANES) {
        floats sums[D][2];
        memcpy(sums, of_q + start * D, sizeof sums);
        for (int d = 0; d < D; d++)
            for (int h = 0; h < 2; h++) sums[d][h] *= root;
        write_queries(sums, tokens - start, step, of_qkv + start * step);
    }
}
