/* Inverse DCT by the accurate integer method (Loeffler, Ligtenberg and Moschytz, 1989, 13-bit constants), as libjpeg
 * defines its rounding; the reduced sizes as libjpeg's jpeg_idct_4x4, 2x2 and 1x1.
 *
 * Both forms of the full transform wrap and saturate alike, so they agree on any input.
 */
#include <string.h>

#include "native.h"

#ifdef VIT_X86
#include <immintrin.h>
#endif

enum {
    BITS = 13,
    EXTRA = 2, /* fraction bits kept between the passes */
    F_0_211 = 1730,
    F_0_298 = 2446,
    F_0_390 = 3196,
    F_0_509 = 4176,
    F_0_541 = 4433,
    F_0_601 = 4926,
    F_0_720 = 5906,
    F_0_765 = 6270,
    F_0_850 = 6967,
    F_0_899 = 7373,
    F_1_061 = 8697,
    F_1_175 = 9633,
    F_1_272 = 10426,
    F_1_451 = 11893,
    F_1_501 = 12299,
    F_1_847 = 15137,
    F_1_961 = 16069,
    F_2_053 = 16819,
    F_2_172 = 17799,
    F_2_562 = 20995,
    F_3_072 = 25172,
    F_3_624 = 29692,
};

/* Products and sums wrap, as vector registers do. */
static inline uint32_t mul(int a, int b) { return (uint32_t)a * (uint32_t)b; }
static inline int descale(uint32_t x, int bits) { return (int32_t)(x + (1u << (bits - 1))) >> bits; }
static inline int16_t saturate16(int x) { return (int16_t)(x < -32768 ? -32768 : x > 32767 ? 32767 : x); }
static inline uint8_t to_pixel(int x) { return (uint8_t)(x < -128 ? 0 : x > 127 ? 255 : x + 128); }

/* One dimension: eight values `step` apart. */
static void idct_8(const int16_t *in, int step, int16_t *out, int bits) {
    int i0 = in[0], i1 = in[step], i2 = in[2 * step], i3 = in[3 * step];
    int i4 = in[4 * step], i5 = in[5 * step], i6 = in[6 * step], i7 = in[7 * step];
    uint32_t t3 = mul(i2, F_0_541 + F_0_765) + mul(i6, F_0_541);
    uint32_t t2 = mul(i2, F_0_541) + mul(i6, F_0_541 - F_1_847);
    uint32_t t0 = mul(i0 + i4, 1 << BITS), t1 = mul(i0 - i4, 1 << BITS);
    uint32_t e0 = t0 + t3, e3 = t0 - t3, e1 = t1 + t2, e2 = t1 - t2;
    int z3 = (int16_t)(i7 + i3), z4 = (int16_t)(i5 + i1);
    uint32_t y3 = mul(z3, F_1_175 - F_1_961) + mul(z4, F_1_175);
    uint32_t y4 = mul(z3, F_1_175) + mul(z4, F_1_175 - F_0_390);
    uint32_t o3 = mul(i7, F_0_298 - F_0_899) + mul(i1, -F_0_899) + y3;
    uint32_t o2 = mul(i5, F_2_053 - F_2_562) + mul(i3, -F_2_562) + y4;
    uint32_t o1 = mul(i3, F_3_072 - F_2_562) + mul(i5, -F_2_562) + y3;
    uint32_t o0 = mul(i1, F_1_501 - F_0_899) + mul(i7, -F_0_899) + y4;
    uint32_t even[4] = {e0, e1, e2, e3}, odd[4] = {o0, o1, o2, o3};
    for (int k = 0; k < 4; k++) {
        out[k] = saturate16(descale(even[k] + odd[k], bits));
        out[7 - k] = saturate16(descale(even[k] - odd[k], bits));
    }
}

void vit_idct_8x8_scalar(const int16_t *pair, uint8_t *out[2], const ptrdiff_t stride[2]) {
    for (int half = 0; half < 2; half++) {
        int16_t columns[8][8], row[8], line[8];
        if (!out[half]) continue;
        for (int x = 0; x < 8; x++) idct_8(pair + half * 8 + x, 16, columns[x], BITS - EXTRA);
        for (int y = 0; y < 8; y++) {
            for (int x = 0; x < 8; x++) line[x] = columns[x][y];
            idct_8(line, 1, row, BITS + EXTRA + 3);
            for (int x = 0; x < 8; x++) out[half][y * stride[half] + x] = to_pixel(row[x]);
        }
    }
}

static void idct_4(const int16_t *in, int step, int16_t *out, int bits) {
    int i0 = in[0], i1 = in[step], i2 = in[2 * step], i3 = in[3 * step];
    int i5 = in[5 * step], i6 = in[6 * step], i7 = in[7 * step];
    uint32_t e0 = mul(i0, 1 << (BITS + 1)), e2 = mul(i2, F_1_847) + mul(i6, -F_0_765);
    uint32_t o0 = mul(i7, -F_0_211) + mul(i5, F_1_451) + mul(i3, -F_2_172) + mul(i1, F_1_061);
    uint32_t o2 = mul(i7, -F_0_509) + mul(i5, -F_0_601) + mul(i3, F_0_899) + mul(i1, F_2_562);
    out[0] = saturate16(descale(e0 + e2 + o2, bits));
    out[3] = saturate16(descale(e0 + e2 - o2, bits));
    out[1] = saturate16(descale(e0 - e2 + o0, bits));
    out[2] = saturate16(descale(e0 - e2 - o0, bits));
}

static void idct_2(const int16_t *in, int step, int16_t *out, int bits) {
    uint32_t even = mul(in[0], 1 << (BITS + 2));
    uint32_t odd = mul(in[7 * step], -F_0_720) + mul(in[5 * step], F_0_850) + mul(in[3 * step], -F_1_272) +
                   mul(in[step], F_3_624);
    out[0] = saturate16(descale(even + odd, bits));
    out[1] = saturate16(descale(even - odd, bits));
}

void vit_idct_reduced(const int16_t *half, int size, uint8_t *out, ptrdiff_t stride) {
    int16_t columns[8][4], row[4], line[8] = {0};
    if (size == 1) {
        out[0] = to_pixel(descale((uint32_t)half[0], 3));
        return;
    }
    /* Bits: the reduced transforms carry 1 or 2 more. */
    int more = size == 4 ? 1 : 2;
    for (int x = 0; x < 8; x++) {
        if (x == 4 || (size == 2 && (x == 2 || x == 6))) continue; /* these columns have no weight */
        (size == 4 ? idct_4 : idct_2)(half + x, 16, columns[x], BITS - EXTRA + more);
    }
    for (int y = 0; y < size; y++) {
        for (int x = 0; x < 8; x++)
            if (x != 4 && (size == 4 || (x != 2 && x != 6))) line[x] = columns[x][y];
        (size == 4 ? idct_4 : idct_2)(line, 1, row, BITS + EXTRA + 3 + more);
        for (int x = 0; x < size; x++) out[y * stride + x] = to_pixel(row[x]);
    }
}

#ifdef VIT_X86

/* A register holds one row of two blocks, a block in each 128-bit lane. */

#define TWO(a, b) _mm256_set1_epi32((int)(((uint32_t)(b) << 16) | ((uint32_t)(a) & 0xffff)))

/* a x + b y in 32 bits, for x and y interleaved. */
#define LINE(lo, hi, xy_lo, xy_hi, a, b)                                                                               \
    __m256i lo = _mm256_madd_epi16(xy_lo, TWO(a, b)), hi = _mm256_madd_epi16(xy_hi, TWO(a, b))
#define INTERLEAVE(lo, hi, x, y)                                                                                       \
    __m256i lo = _mm256_unpacklo_epi16(x, y), hi = _mm256_unpackhi_epi16(x, y)

/* v[first] = even + odd and v[last] = even - odd, descaled. */
#define FINISH(first, last, even, odd)                                                                                 \
    do {                                                                                                               \
        __m256i a = _mm256_add_epi32(even##_lo, round), b = _mm256_add_epi32(even##_hi, round);                        \
        v[first] = _mm256_packs_epi32(_mm256_sra_epi32(_mm256_add_epi32(a, odd##_lo), count),                          \
                                      _mm256_sra_epi32(_mm256_add_epi32(b, odd##_hi), count));                         \
        v[last] = _mm256_packs_epi32(_mm256_sra_epi32(_mm256_sub_epi32(a, odd##_lo), count),                           \
                                     _mm256_sra_epi32(_mm256_sub_epi32(b, odd##_hi), count));                          \
    } while (0)

VIT_AVX2 static inline __attribute__((always_inline)) void idct_rows(__m256i v[8], int bits) {
    const __m256i round = _mm256_set1_epi32(1 << (bits - 1));
    const __m128i count = _mm_cvtsi32_si128(bits);
    INTERLEAVE(v26_lo, v26_hi, v[2], v[6]);
    LINE(t3_lo, t3_hi, v26_lo, v26_hi, F_0_541 + F_0_765, F_0_541);
    LINE(t2_lo, t2_hi, v26_lo, v26_hi, F_0_541, F_0_541 - F_1_847);
    INTERLEAVE(v04_lo, v04_hi, v[0], v[4]);
    LINE(t0_lo, t0_hi, v04_lo, v04_hi, 1 << BITS, 1 << BITS);
    LINE(t1_lo, t1_hi, v04_lo, v04_hi, 1 << BITS, -(1 << BITS));
    __m256i e0_lo = _mm256_add_epi32(t0_lo, t3_lo), e0_hi = _mm256_add_epi32(t0_hi, t3_hi);
    __m256i e3_lo = _mm256_sub_epi32(t0_lo, t3_lo), e3_hi = _mm256_sub_epi32(t0_hi, t3_hi);
    __m256i e1_lo = _mm256_add_epi32(t1_lo, t2_lo), e1_hi = _mm256_add_epi32(t1_hi, t2_hi);
    __m256i e2_lo = _mm256_sub_epi32(t1_lo, t2_lo), e2_hi = _mm256_sub_epi32(t1_hi, t2_hi);
    __m256i z3 = _mm256_add_epi16(v[7], v[3]), z4 = _mm256_add_epi16(v[5], v[1]);
    INTERLEAVE(z_lo, z_hi, z3, z4);
    LINE(y3_lo, y3_hi, z_lo, z_hi, F_1_175 - F_1_961, F_1_175);
    LINE(y4_lo, y4_hi, z_lo, z_hi, F_1_175, F_1_175 - F_0_390);
    INTERLEAVE(v71_lo, v71_hi, v[7], v[1]);
    LINE(p3_lo, p3_hi, v71_lo, v71_hi, F_0_298 - F_0_899, -F_0_899);
    LINE(p0_lo, p0_hi, v71_lo, v71_hi, -F_0_899, F_1_501 - F_0_899);
    INTERLEAVE(v53_lo, v53_hi, v[5], v[3]);
    LINE(p2_lo, p2_hi, v53_lo, v53_hi, F_2_053 - F_2_562, -F_2_562);
    LINE(p1_lo, p1_hi, v53_lo, v53_hi, -F_2_562, F_3_072 - F_2_562);
    __m256i o3_lo = _mm256_add_epi32(p3_lo, y3_lo), o3_hi = _mm256_add_epi32(p3_hi, y3_hi);
    __m256i o2_lo = _mm256_add_epi32(p2_lo, y4_lo), o2_hi = _mm256_add_epi32(p2_hi, y4_hi);
    __m256i o1_lo = _mm256_add_epi32(p1_lo, y3_lo), o1_hi = _mm256_add_epi32(p1_hi, y3_hi);
    __m256i o0_lo = _mm256_add_epi32(p0_lo, y4_lo), o0_hi = _mm256_add_epi32(p0_hi, y4_hi);
    FINISH(0, 7, e0, o0);
    FINISH(1, 6, e1, o1);
    FINISH(2, 5, e2, o2);
    FINISH(3, 4, e3, o3);
}

VIT_AVX2 static inline __attribute__((always_inline)) void transpose(__m256i v[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) { /* rows 0-3, rows 4-7 */
        b[4 * i] = _mm256_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

VIT_AVX2 void vit_idct_8x8_avx2(const int16_t *pair, uint8_t *out[2], const ptrdiff_t stride[2]) {
    __m256i v[8];
    for (int i = 0; i < 8; i++) v[i] = _mm256_load_si256((const __m256i *)(pair + 16 * i));
    idct_rows(v, BITS - EXTRA);
    transpose(v);
    idct_rows(v, BITS + EXTRA + 3);
    transpose(v);
    const __m256i middle = _mm256_set1_epi8(-128);
    for (int i = 0; i < 8; i += 2) {
        __m256i rows = _mm256_xor_si256(_mm256_packs_epi16(v[i], v[i + 1]), middle);
        __m128i first = _mm256_castsi256_si128(rows), second = _mm256_extracti128_si256(rows, 1);
        if (out[0]) {
            _mm_storel_epi64((__m128i *)(out[0] + i * stride[0]), first);
            _mm_storeh_pd((double *)(out[0] + (i + 1) * stride[0]), _mm_castsi128_pd(first));
        }
        if (out[1]) {
            _mm_storel_epi64((__m128i *)(out[1] + i * stride[1]), second);
            _mm_storeh_pd((double *)(out[1] + (i + 1) * stride[1]), _mm_castsi128_pd(second));
        }
    }
}

#endif
