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

/* The product of two rows of 8. */
INLINE float product_of_eight(const bf16 *a, const bf16 *b) {
    __m128 sums = _mm_dpbf16_ps(_mm_setzero_ps(), (__m128bh)_mm_loadu_si128((const __m128i *)a),
                                (__m128bh)_mm_loadu_si128((const __m128i *)b));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return sums[0] + sums[1];
}

#endif
