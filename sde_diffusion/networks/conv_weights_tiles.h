/* The sums of conv_weights.c by the processor's matrix tiles (AMX): 16 positions of two images at once. */

#define WORDS 256 /* of a tile */

static const layout FULL = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* 16 channels of a pair of images as tiles, (g_line / 16, 16 channels, 16 positions), two positions of each row and those
   after the last being zero; and their sums. */
static void pack_g_tiles(const problem *p, const bf16 *a, const bf16 *b, int64_t channels, words *to, float *sums) {
    floats sum = {0};
    int64_t r = 0, c = 0;
    for (words *end = to + p->g_line; to < end; to += LANES) {
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
static void add_tiles(const problem *p, int64_t pairs, int64_t m_block, int64_t n_block, int64_t dy, int first) {
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
        const words *g = p->packed_g + (q * p->out_blocks + m_block) * p->g_line;
        const words *x = p->packed_x + (q * p->in_blocks + n_block) * p->line + dy * p->row, *y = x + p->line;
#define ADD(t, j, dx)                     \
    _tile_loadd(7, (j ? y : x) + dx, 64); \
    _tile_dpbf16ps(t, 6, 7);
        for (const words *end = g + p->g_line; g < end; g += LANES, x += LANES, y += LANES) {
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
