/* Heads of narrow_attention.c by the processor's matrix tiles (AMX): all products of matrices there, exponentials and
   what follows them in vectors. Weights and their slopes are rounded to bfloat16 on their way from the one to the other.

   A tile holds up to 16 rows of 64 bytes. C += A B takes A as rows of bfloat16 and B in pairs: its row r has the rows 2 r
   and 2 r + 1 of the matrix, interleaved. */

/* The tiles of the two functions: rows and bytes of a row. */
static const layout FORWARD = {1, 0, {0}, {64, 64, 64, 32, 64, 64, 64}, {8, 16, 16, 16, 8, 8, 16}};
static const layout BACKWARD = {1, 0, {0}, {64, 64, 64, 64, 32, 32, 32, 64}, {8, 8, 8, 16, 16, 16, 8, 16}};

/* Of a head whose tokens are `stride` apart the transpose (8, tokens), in blocks of `block` tokens. */
INLINE void as_columns(const bf16 *from, int64_t stride, int64_t tokens, int64_t block, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) to[t / block * block * D + d * block + t % block] = from[t * stride + d];
}

/* The logits of 32 keys from `rows` on and the 16 queries in tile 4, not yet scaled. */
INLINE void forward_logits(const bf16 *rows, float to[2 * BLOCK][LANES]) {
    _tile_loadd(3, rows, 2 * WIDE);
    _tile_zero(1);
    _tile_dpbf16ps(1, 3, 4);
    _tile_loadd(3, rows + BLOCK * WIDE, 2 * WIDE);
    _tile_zero(2);
    _tile_dpbf16ps(2, 3, 4);
    _tile_stored(1, to, 64);
    _tile_stored(2, to + BLOCK, 64);
}

/* room: 40 padded numbers, zero. */
INLINE void forward_tiles(const bf16 *qkv, bf16 *out, float *logs, int64_t tokens, int64_t padded, int64_t channels,
                          bf16 *room) {
    bf16 *q = room, *k = q + WIDE * padded, *v = k + WIDE * padded;
    float logits[2][2 * BLOCK][LANES] __attribute__((aligned(64))), result[D][LANES] __attribute__((aligned(64)));
    bf16 weights[BLOCK][2 * LANES] __attribute__((aligned(64)));
    const float scale = LOG2E / sqrtf((float)D);
    as_pairs_of_channels(qkv, 3 * channels, tokens, q);
    as_rows(qkv + channels, 3 * channels, tokens, k);
    as_columns(qkv + 2 * channels, 3 * channels, tokens, 2 * BLOCK, v);
    for (int64_t start = 0; start < tokens; start += LANES) {
        floats total = {0};
        WRITTEN;
        _tile_loadd(4, q + start * WIDE, 64);
        _tile_zero(0);
        forward_logits(k, logits[0]);
        for (int64_t key = 0, turn = 0; key < tokens; key += 2 * BLOCK, turn ^= 1) {
            if (key + 2 * BLOCK < tokens) forward_logits(k + (key + 2 * BLOCK) * WIDE, logits[turn ^ 1]);
            for (int t = 0; t < 2 * BLOCK; t += 2) {
                floats even = {0}, odd = {0};
                if (key + t < tokens) even = coarse_power(at(logits[turn][t]) * scale);
                if (key + t + 1 < tokens) odd = coarse_power(at(logits[turn][t + 1]) * scale);
                total += even + odd;
                _mm512_store_si512(weights[t / 2], paired(even, odd));
            }
            WRITTEN;
            _tile_loadd(5, v + key * D, 64);
            _tile_loadd(6, weights, 64);
            _tile_dpbf16ps(0, 5, 6);
            WRITTEN;
        }
        _tile_stored(0, result, 64);
        for (int i = 0; i < LANES && start + i < tokens; i++) {
            for (int d = 0; d < D; d++) out[(start + i) * channels + d] = narrow(result[d][i] / total[i]);
            if (logs) logs[start + i] = log2f(total[i]);
        }
    }
}

/* Of 16 keys and 32 queries: the logits, not yet scaled, and the products of the result's gradient with the values. */
typedef struct {
    float logits[2][BLOCK][LANES], products[2][BLOCK][LANES];
} __attribute__((aligned(64))) scores;

INLINE void backward_scores(const bf16 *k, const bf16 *v, const bf16 *q, const bf16 *g, scores *to) {
    const bf16 *rows[2] = {k, v}, *columns[2] = {q, g};
    for (int i = 0; i < 2; i++) {
        _tile_loadd(4, rows[i], 2 * WIDE);
        _tile_loadd(2, columns[i], 64);
        _tile_zero(3);
        _tile_dpbf16ps(3, 4, 2);
        _tile_loadd(2, columns[i] + BLOCK * WIDE, 64);
        _tile_zero(7);
        _tile_dpbf16ps(7, 4, 2);
        _tile_stored(3, i ? to->products[0] : to->logits[0], 64);
        _tile_stored(7, i ? to->products[1] : to->logits[1], 64);
    }
}

/* room: 124 padded numbers, zero. */
INLINE void backward_tiles(const bf16 *qkv, const bf16 *out, const bf16 *grad, const float *logs, bf16 *of_qkv,
                           int64_t tokens, int64_t padded, int64_t channels, bf16 *room) {
    int64_t wide = WIDE * padded, size = D * padded, step = 3 * channels;
    bf16 *k = room, *v = k + wide, *q = v + wide, *g = q + wide; /* as the products with keys and values take them */
    bf16 *k_columns = g + wide, *q_pairs = k_columns + size, *g_pairs = q_pairs + size;
    float *of_k = (float *)(g_pairs + size), *of_v = of_k + size, *log = of_v + size, *along = log + padded;
    scores found[2];
    bf16 weights[BLOCK][2 * LANES] __attribute__((aligned(64))), slopes[BLOCK][2 * LANES] __attribute__((aligned(64)));
    bf16 slope_pairs[2][BLOCK / 2][2 * LANES] __attribute__((aligned(64)));
    float of_q[2][D][LANES] __attribute__((aligned(64)));
    const float root = 1.0f / sqrtf((float)D), scale = LOG2E * root;
    as_rows(qkv + channels, step, tokens, k);
    as_rows(qkv + 2 * channels, step, tokens, v);
    as_pairs_of_channels(qkv, step, tokens, q);
    as_pairs_of_channels(grad, channels, tokens, g);
    as_columns(qkv + channels, step, tokens, BLOCK, k_columns);
    as_pairs_of_tokens(qkv, step, tokens, q_pairs);
    as_pairs_of_tokens(grad, channels, tokens, g_pairs);
    for (int64_t t = 0; t < tokens; t++) along[t] = product_of_eight(grad + t * channels, out + t * channels);
    memcpy(log, logs, tokens * sizeof(float));
    for (int64_t start = 0; start < tokens; start += 2 * LANES) {
        floats shift[2] = {at(log + start), at(log + start + LANES)};
        floats drift[2] = {at(along + start), at(along + start + LANES)};
        WRITTEN;
        _tile_zero(0);
        _tile_zero(1);
        backward_scores(k, v, q + start * WIDE, g + start * WIDE, &found[0]);
        for (int64_t key = 0, turn = 0; key < tokens; key += BLOCK, turn ^= 1) {
            int64_t next = key + BLOCK;
            if (next < tokens)
                backward_scores(k + next * WIDE, v + next * WIDE, q + start * WIDE, g + start * WIDE, &found[turn ^ 1]);
            const scores *now = &found[turn];
            for (int t = 0; t < BLOCK; t += 2) {
                floats p[2][2], slope[2][2]; /* keys, queries */
                for (int i = 0; i < 2; i++)
                    for (int h = 0; h < 2; h++) {
                        p[i][h] = slope[i][h] = (floats){0};
                        if (key + t + i < tokens) {
                            p[i][h] = coarse_power(at(now->logits[h][t + i]) * scale - shift[h]);
                            slope[i][h] = p[i][h] * (at(now->products[h][t + i]) - drift[h]);
                        }
                    }
                for (int i = 0; i < 2; i++) {
                    _mm512_store_si512(weights[t + i], rounded(p[i][0], p[i][1]));
                    _mm512_store_si512(slopes[t + i], rounded(slope[i][0], slope[i][1]));
                }
                for (int h = 0; h < 2; h++) _mm512_store_si512(slope_pairs[h][t / 2], paired(slope[0][h], slope[1][h]));
            }
            WRITTEN;
            _tile_loadd(5, of_v + key * D, 4 * D);
            _tile_loadd(3, weights, 64);
            _tile_loadd(4, g_pairs + start * D, 4 * D);
            _tile_dpbf16ps(5, 3, 4);
            _tile_stored(5, of_v + key * D, 4 * D);
            _tile_loadd(5, of_k + key * D, 4 * D);
            _tile_loadd(3, slopes, 64);
            _tile_loadd(4, q_pairs + start * D, 4 * D);
            _tile_dpbf16ps(5, 3, 4);
            _tile_stored(5, of_k + key * D, 4 * D);
            _tile_loadd(6, k_columns + key * D, 2 * BLOCK);
            _tile_loadd(2, slope_pairs[0], 64);
            _tile_dpbf16ps(0, 6, 2);
            _tile_loadd(2, slope_pairs[1], 64);
            _tile_dpbf16ps(1, 6, 2);
            WRITTEN;
        }
        _tile_stored(0, of_q[0], 64);
        _tile_stored(1, of_q[1], 64);
        for (int64_t i = 0; i < 2 * LANES && start + i < tokens; i++)
            for (int d = 0; d < D; d++)
                of_qkv[(start + i) * step + d] = narrow(of_q[i / LANES][d][i % LANES] * root);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) {
            of_qkv[t * step + channels + d] = narrow(of_k[t * D + d] * root);
            of_qkv[t * step + 2 * channels + d] = narrow(of_v[t * D + d]);
        }
}
