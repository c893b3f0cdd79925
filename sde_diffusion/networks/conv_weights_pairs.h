/* The sums of conv_weights.c by products of pairs in bfloat16 (AVX-512 BF16). */

#define ROWS 8 /* channels of the result at a time */

/* 16 channels of a pair of images as a line of 16 words for each pixel, and their sums. */
static void pack_g(const problem *p, const bf16 *a, const bf16 *b, int64_t channels, words *to, float *sums) {
    floats sum = {0};
    for (int64_t i = 0; i < p->g_line; i++) {
        to[i] = pair(a, b, channels);
        sum += (floats)(to[i] << 16) + (floats)(to[i] & 0xffff0000);
        a += p->out;
        if (b) b += p->out;
    }
    memcpy(sums, &sum, sizeof sum);
}

/* The weights of up to 8 channels of the result from `m` on, of 16 of x, and of the taps of one row; of so many packed
   pairs, plus what was there unless these are the first. */
INLINE void add_rows(const problem *p, int64_t pairs, int64_t m, int64_t n_block, int64_t dy, int first) {
    floats sums[ROWS][3];
    int64_t count = p->out - m;
    float *weights = p->of_weight + (m * TAPS + dy * 3) * p->in + n_block * LANES;
    if (count > ROWS) count = ROWS;
    __mmask16 lanes = lanes_from(n_block * LANES, p->in);
    for (int i = 0; i < ROWS; i++)
        for (int dx = 0; dx < 3; dx++) {
            sums[i][dx] = (floats){0};
            if (i < count && !first)
                sums[i][dx] = (floats)_mm512_maskz_loadu_ps(lanes, weights + (i * TAPS + dx) * p->in);
        }
    /* The row beyond the image is zero. */
    int64_t begin = dy == 0, end = p->height - (dy == 2);
    for (int64_t q = 0; q < pairs; q++) {
        const words *g = p->packed_g + (q * p->out_blocks + m / LANES) * p->g_line + begin * p->width;
        const words *x = p->packed_x + (q * p->in_blocks + n_block) * p->line + (begin + dy) * p->row;
        for (int64_t r = begin; r < end; r++, x += p->row)
            for (int64_t c = 0; c < p->width; c++, g++) {
                const bf16 *rows = (const bf16 *)g + 2 * (m % LANES);
                for (int i = 0; i < ROWS; i++) {
                    __m512i row = two(rows + 2 * i);
                    for (int dx = 0; dx < 3; dx++) sums[i][dx] = add_products(sums[i][dx], row, (__m512i)x[c + dx]);
                }
            }
    }
    for (int i = 0; i < ROWS; i++)
        for (int dx = 0; dx < 3; dx++)
            if (i < count) _mm512_mask_storeu_ps(weights + (i * TAPS + dx) * p->in, lanes, (__m512)sums[i][dx]);
}

static void add_pairs(const problem *p, int64_t pairs, int64_t m_block, int64_t n_block, int64_t dy, int first) {
    for (int64_t m = m_block * LANES; m < p->out && m < (m_block + 1) * LANES; m += ROWS)
        add_rows(p, pairs, m, n_block, dy, first);
}
