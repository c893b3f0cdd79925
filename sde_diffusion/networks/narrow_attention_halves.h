/* What narrow_attention.c does with bfloat16 by tiles and by pairs: heads as the products take them.

   Channels are padded from 8 to 16 by zeros, tokens to a multiple of 32. */

#define BLOCK 16
#define WIDE 16 /* channels with their padding */

/* Of a head whose tokens are `stride` apart: (tokens, 16) */
INLINE void as_rows(const bf16 *from, int64_t stride, int64_t tokens, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++) memcpy(to + t * WIDE, from + t * stride, D * sizeof(bf16));
}

/* the transpose in pairs of channels, (8, 16, 2) for each 16 tokens, of which the last four rows are padding; */
INLINE void as_pairs_of_channels(const bf16 *from, int64_t stride, int64_t tokens, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d += 2)
            memcpy(to + t / BLOCK * BLOCK * WIDE + d * BLOCK + t % BLOCK * 2, from + t * stride + d, 2 * sizeof(bf16));
}

/* in pairs of tokens, (tokens / 2, 8, 2). */
INLINE void as_pairs_of_tokens(const bf16 *from, int64_t stride, int64_t tokens, bf16 *to) {
    for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < D; d++) to[t / 2 * 2 * D + d * 2 + t % 2] = from[t * stride + d];
}
