/* Sums of products of two numbers in bfloat16 at a time (AVX-512 BF16), where the compiler has them for this processor:
   then HAVE_PAIRS is defined. After vectors.h. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAVE_PAIRS

/* sum + a b, in each of 16 lanes for two numbers. */
INLINE floats add_products(floats sum, __m512i a, __m512i b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

/* The two numbers at x, and the four, over and over. */
INLINE __m512i two(const bf16 *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

INLINE __m512i four(const bf16 *x) {
    int64_t both;
    memcpy(&both, x, sizeof both);
    return _mm512_set1_epi64(both);
}

/* Which of 16 channels from `from` on there are. */
INLINE __mmask16 lanes_from(int64_t from, int64_t channels) {
    int64_t rest = channels - from;
    return rest >= LANES ? 0xffff : rest <= 0 ? 0 : (__mmask16)((1u << rest) - 1);
}

/* Of 16 numbers those that are there, the others zero. */
INLINE floats widened(const bf16 *x, __mmask16 there) {
    return (floats)((words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x)) << 16);
}

/* 32 numbers in bfloat16. */
INLINE __m512i rounded(floats low, floats high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

/* Two rows of a matrix as one of its pairs. */
INLINE __m512i paired(floats even, floats odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rounded(even, odd));
}

/* The transpose of 16x16 words. */
INLINE void transpose(words rows[LANES], words *to) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        to[i] = (words)_mm512_shuffle_i32x4(low, low2, 0x88);
        to[i + 8] = (words)_mm512_shuffle_i32x4(low, low2, 0xdd);
        to[i + 4] = (words)_mm512_shuffle_i32x4(high, high2, 0x88);
        to[i + 12] = (words)_mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

/* The product of two rows of 8. */
INLINE float product_of_eight(const bf16 *a, const bf16 *b) {
    __m128 sums = _mm_dpbf16_ps(_mm_setzero_ps(), (__m128bh)_mm_loadu_si128((const __m128i *)a),
                                (__m128bh)_mm_loadu_si128((const __m128i *)b));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return sums[0] + sums[1];
}

#endif
