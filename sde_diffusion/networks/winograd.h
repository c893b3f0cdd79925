/* Winograd's F(2x2, 3x3) (Winograd 1980; Lavin & Gray 2016, section 4.1), which two C files here share: the transforms of 2x2
   results, of the 4x4 pixels they depend on and of 3x3 weights, in each of 16 lanes, and the product of matrices between
   them. After vectors.h and pairs.h. */

#define POINTS 16 /* of a tile's transform */
#define GROUP 6   /* rows at a time in a product of matrices */
#define VECTORS 4 /* of 16 columns at a time there */
#define CHUNK (VECTORS * LANES)
#define APART 160 /* between the planes of points, so that a tile's 16 are not all in the same places of a cache */

/* The tiles of an image, which are numbered through all images. */
typedef struct {
    int64_t height, width, rows, columns;
} grid;

/* Of a tile: its image, and the first of its 2x2 results. */
typedef struct {
    int64_t image, y, x;
} place;

INLINE grid make_grid(int64_t height, int64_t width) { return (grid){height, width, (height + 1) / 2, (width + 1) / 2}; }

INLINE place place_of(const grid *g, int64_t tile) {
    return (place){tile / (g->rows * g->columns), tile / g->columns % g->rows * 2, tile % g->columns * 2};
}

/* The numbers of size x size pixels from (y, x) on, in their image; -1 outside. */
INLINE void pixels_at(const grid *g, int64_t y, int64_t x, int size, int64_t *to) {
    for (int i = 0; i < size * size; i++) {
        int64_t r = y + i / size, c = x + i % size;
        to[i] = r >= 0 && r < g->height && c >= 0 && c < g->width ? r * g->width + c : -1;
    }
}

/* B' d B, in place. */
INLINE void transform_pixels(floats d[POINTS]) {
    for (int i = 0; i < 4; i++) {
        floats a = d[i], b = d[4 + i], c = d[8 + i], e = d[12 + i];
        d[i] = a - c, d[4 + i] = b + c, d[8 + i] = c - b, d[12 + i] = b - e;
    }
    for (int i = 0; i < POINTS; i += 4) {
        floats a = d[i], b = d[i + 1], c = d[i + 2], e = d[i + 3];
        d[i] = a - c, d[i + 1] = b + c, d[i + 2] = c - b, d[i + 3] = b - e;
    }
}

/* G g G'. */
INLINE void transform_filter(const floats g[9], floats u[POINTS]) {
    floats lines[12]; /* (4, 3) */
    for (int i = 0; i < 3; i++) {
        floats outer = (g[i] + g[6 + i]) * 0.5f, inner = g[3 + i] * 0.5f;
        lines[i] = g[i], lines[3 + i] = outer + inner, lines[6 + i] = outer - inner, lines[9 + i] = g[6 + i];
    }
    for (int i = 0; i < 4; i++) {
        const floats *l = lines + 3 * i;
        floats outer = (l[0] + l[2]) * 0.5f, inner = l[1] * 0.5f;
        u[4 * i] = l[0], u[4 * i + 1] = outer + inner, u[4 * i + 2] = outer - inner, u[4 * i + 3] = l[2];
    }
}

/* A' m A: 2x2. */
INLINE void transform_result(const floats m[POINTS], floats y[4]) {
    floats lines[8]; /* (2, 4) */
    for (int i = 0; i < 4; i++) {
        lines[i] = m[i] + m[4 + i] + m[8 + i];
        lines[4 + i] = m[4 + i] - m[8 + i] - m[12 + i];
    }
    for (int i = 0; i < 2; i++) {
        const floats *l = lines + 4 * i;
        y[2 * i] = l[0] + l[1] + l[2];
        y[2 * i + 1] = l[1] - l[2] - l[3];
    }
}

/* A y A' of 2x2 numbers, and G' m G: 3x3, the derivatives of the transforms of results and of weights. */
INLINE void transform_gradient(const floats y[4], floats d[POINTS]) {
    floats lines[8]; /* (4, 2) */
    for (int i = 0; i < 2; i++) {
        lines[i] = y[i], lines[2 + i] = y[i] + y[2 + i];
        lines[4 + i] = y[i] - y[2 + i], lines[6 + i] = -y[2 + i];
    }
    for (int i = 0; i < 4; i++) {
        floats a = lines[2 * i], b = lines[2 * i + 1];
        d[4 * i] = a, d[4 * i + 1] = a + b, d[4 * i + 2] = a - b, d[4 * i + 3] = -b;
    }
}

INLINE void transform_weights(const floats m[POINTS], floats w[9]) {
    floats lines[12]; /* (3, 4) */
    for (int i = 0; i < 4; i++) {
        floats b = m[4 + i] * 0.5f, c = m[8 + i] * 0.5f;
        lines[i] = m[i] + (b + c), lines[4 + i] = b - c, lines[8 + i] = (b + c) + m[12 + i];
    }
    for (int i = 0; i < 3; i++) {
        const floats *l = lines + 4 * i;
        floats b = l[1] * 0.5f, c = l[2] * 0.5f;
        w[3 * i] = l[0] + (b + c), w[3 * i + 1] = b - c, w[3 * i + 2] = (b + c) + l[3];
    }
}

/* The product of two matrices in bfloat16, (6, pairs, 2) and (pairs, 16 vectors, 2): (6, 16 vectors). `down` and `along` are
   the steps from row to row of the first, and from pair to pair. */
INLINE void multiply(const bf16 *a, int64_t down, int64_t along, const bf16 *b, int64_t pairs, float *to, int vectors) {
    floats sums[GROUP][VECTORS];
    for (int i = 0; i < GROUP; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = (floats){0};
    for (int64_t c = 0; c < pairs; c++, a += along, b += vectors * 2 * LANES) {
        __m512i columns[VECTORS];
        for (int j = 0; j < vectors; j++) columns[j] = _mm512_load_si512(b + j * 2 * LANES);
        for (int i = 0; i < GROUP; i++) {
            __m512i pair = two(a + i * down);
            for (int j = 0; j < vectors; j++) sums[i][j] = add_products(sums[i][j], pair, columns[j]);
        }
    }
    for (int i = 0; i < GROUP; i++)
        for (int j = 0; j < vectors; j++) _mm512_store_ps(to + (i * vectors + j) * LANES, (__m512)sums[i][j]);
}

/* How many vectors there are from channel `from` on, of the 4 at a time. */
INLINE int vectors_from(int64_t from, int64_t channels) {
    int64_t rest = channels - from;
    return rest >= CHUNK ? VECTORS : (int)((rest + LANES - 1) / LANES);
}

/* Does something with a number of vectors that is constant. */
#define FOR_VECTORS(count, WHAT)  \
    do switch (count) {           \
        case 1: WHAT(1); break;   \
        case 2: WHAT(2); break;   \
        case 3: WHAT(3); break;   \
        default: WHAT(4);         \
    } while (0)
