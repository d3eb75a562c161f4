/* Antialiased resizing of 8-bit rows with 16-bit weights: across first, then down, 8 bits in between.
 *
 * The arithmetic (ranges, weights in double, their rounding to the most bits that fit, order of the passes) is that of
 * torch.nn.functional.interpolate(uint8, antialias=True), so that both give the same pixels.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

#ifdef VIT_X86
#include <immintrin.h>
#endif

static double triangle(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

static double keys(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

int vit_make_filter(vit_filter *filter, int size_in, int size_out, int cubic, int multiple) {
    double scale = (double)size_in / size_out, widen = scale >= 1 ? scale : 1;
    double support = (cubic ? 2 : 1) * widen, largest = 0;
    int most = (int)ceil(support) * 2 + 1;
    int taps = (most + multiple - 1) / multiple * multiple;
    size_t count = (size_t)size_out * (size_t)taps;
    filter->size_out = size_out;
    filter->taps = taps;
    filter->start = vit_grow(filter->start, &filter->start_capacity, (size_t)size_out * sizeof *filter->start);
    filter->weights = vit_grow(filter->weights, &filter->weights_capacity, count * sizeof *filter->weights);
    double *exact = calloc(count, sizeof *exact);
    if (!filter->start || !filter->weights || !exact) {
        free(exact);
        return VIT_NO_MEMORY;
    }
    int widest = 1;
    for (int i = 0; i < size_out; i++) {
        double center = scale * (i + 0.5), total = 0, *w = exact + (size_t)i * (size_t)taps;
        int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
        if (first < 0) first = 0;
        if (last > size_in) last = size_in;
        int n = last - first < most ? last - first : most;
        for (int j = 0; j < n; j++) {
            double x = (j + first - center + 0.5) / widen;
            w[j] = cubic ? keys(x) : triangle(x);
            total += w[j];
        }
        for (int j = 0; j < n; j++) {
            w[j] /= total;
            if (w[j] > largest) largest = w[j];
        }
        if (n > widest) widest = n;
        filter->start[i] = first;
    }
    int shift = 0;
    while (shift < 22 && (int)(0.5 + largest * (1 << (shift + 1))) < 1 << 15) shift++;
    filter->shift = shift;
    filter->taps = (widest + multiple - 1) / multiple * multiple;
    for (int i = 0; i < size_out; i++) {
        for (int j = 0; j < filter->taps; j++) {
            double w = exact[(size_t)i * (size_t)taps + (size_t)j] * (1 << shift);
            filter->weights[(size_t)i * (size_t)filter->taps + (size_t)j] = (int16_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
    }
    free(exact);
    return VIT_OK;
}

static inline uint8_t clamp(int32_t x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

/* Loops of fixed length over neighbours, which compilers turn into the vector code of any processor. */

void vit_resample_rows_scalar(const vit_filter *filter, const uint8_t *row[2], uint8_t *out[2], int plane_stride,
                              int flip) {
    int n = filter->size_out, taps = filter->taps;
    for (int x = 0; x < n; x++) {
        int from = flip ? n - 1 - x : x;
        const int16_t *w = filter->weights + (size_t)from * (size_t)taps;
        for (int r = 0; r < 2; r++) {
            const uint8_t *p = row[r] + 4 * filter->start[from];
            int32_t half = (1 << filter->shift) >> 1, sum[4] = {half, half, half, half};
            for (int j = 0; j < taps; j++, p += 4)
                for (int c = 0; c < 4; c++) sum[c] += w[j] * p[c];
            for (int c = 0; c < 3; c++) out[r][c * plane_stride + x] = clamp(sum[c] >> filter->shift);
        }
    }
}

void vit_resample_column_scalar(const vit_filter *filter, int y, const uint8_t *rows, ptrdiff_t in_stride, int width,
                                uint8_t *out) {
    enum { TOGETHER = 32 };
    const int16_t *w = filter->weights + (size_t)y * (size_t)filter->taps;
    const uint8_t *top = rows + filter->start[y] * in_stride;
    int shift = filter->shift;
    for (int x = 0; x < width; x += TOGETHER) {
        int32_t sum[TOGETHER];
        const uint8_t *p = top + x;
        for (int i = 0; i < TOGETHER; i++) sum[i] = (1 << shift) >> 1;
        for (int j = 0; j < filter->taps; j++, p += in_stride)
            for (int i = 0; i < TOGETHER; i++) sum[i] += w[j] * p[i];
        for (int i = 0; i < TOGETHER; i++) out[x + i] = clamp(sum[i] >> shift);
    }
}

#ifdef VIT_X86

/* One output pixel of two rows, a row in each 128-bit lane: R G B as 32-bit sums. Four taps a turn. */
VIT_AVX2 static inline __attribute__((always_inline)) __m256i pixel(const vit_filter *filter, int from,
                                                                    const uint8_t *a, const uint8_t *b, int taps) {
    /* Bytes of two neighbouring pixels side by side, as 16-bit numbers: r0 r1 g0 g1 b0 b1 0 0. */
    const __m256i first = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1,  //
                                           0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, -1, -1, -1, -1);
    const __m256i second = _mm256_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, -1, -1, -1, -1,  //
                                            8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, -1, -1, -1, -1);
    const int16_t *w = filter->weights + (size_t)from * (size_t)taps;
    a += 4 * filter->start[from];
    b += 4 * filter->start[from];
    __m256i sum = _mm256_set1_epi32((1 << filter->shift) >> 1);
    for (int j = 0; j < taps; j += 4) {
        int32_t pair[2];
        memcpy(pair, w + j, sizeof pair);
        __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(a + 4 * j))),
                                               _mm_loadu_si128((const __m128i *)(b + 4 * j)), 1);
        __m256i p = _mm256_madd_epi16(_mm256_shuffle_epi8(four, first), _mm256_set1_epi32(pair[0]));
        __m256i q = _mm256_madd_epi16(_mm256_shuffle_epi8(four, second), _mm256_set1_epi32(pair[1]));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(p, q));
    }
    return _mm256_sra_epi32(sum, _mm_cvtsi32_si128(filter->shift));
}

VIT_AVX2 static inline __attribute__((always_inline)) void resample_rows(const vit_filter *filter,
                                                                         const uint8_t *row[2], uint8_t *out[2],
                                                                         int plane_stride, int flip, int taps) {
    const __m256i by_plane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                              0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const uint8_t *a = row[0], *b = row[1];
    int n = filter->size_out;
    for (int x = 0; x < n; x += 4) {
        __m256i four[4];
        for (int i = 0; i < 4; i++) {
            int at = x + i < n ? x + i : n - 1;
            four[i] = pixel(filter, flip ? n - 1 - at : at, a, b, taps);
        }
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(four[0], four[1]), _mm256_packs_epi32(four[2], four[3]));
        bytes = _mm256_shuffle_epi8(bytes, by_plane);
        for (int r = 0; r < 2; r++) {
            __m128i planes = r ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes);
            uint32_t samples[4];
            _mm_storeu_si128((__m128i *)samples, planes);
            for (int c = 0; c < 3; c++) memcpy(out[r] + c * plane_stride + x, &samples[c], 4);
        }
    }
}

VIT_AVX2 void vit_resample_rows_avx2(const vit_filter *filter, const uint8_t *row[2], uint8_t *out[2], int plane_stride,
                                     int flip) {
    if (filter->taps == 4) { /* up to 1.5 times smaller: most crops */
        resample_rows(filter, row, out, plane_stride, flip, 4);
    } else {
        resample_rows(filter, row, out, plane_stride, flip, filter->taps);
    }
}

VIT_AVX2 void vit_resample_column_avx2(const vit_filter *filter, int y, const uint8_t *rows, ptrdiff_t in_stride,
                                       int width, uint8_t *out) {
    const int16_t *w = filter->weights + (size_t)y * (size_t)filter->taps;
    const uint8_t *top = rows + filter->start[y] * in_stride;
    const __m128i count = _mm_cvtsi32_si128(filter->shift);
    const __m256i zero = _mm256_setzero_si256();
    for (int x = 0; x < width; x += 32) {
        __m256i s0 = _mm256_set1_epi32((1 << filter->shift) >> 1), s1 = s0, s2 = s0, s3 = s0;
        const uint8_t *p = top + x;
        for (int j = 0; j < filter->taps; j += 2, p += 2 * in_stride) {
            int32_t pair;
            memcpy(&pair, w + j, sizeof pair);
            __m256i weights = _mm256_set1_epi32(pair);
            __m256i a = _mm256_loadu_si256((const __m256i *)p);
            __m256i b = _mm256_loadu_si256((const __m256i *)(p + in_stride));
            __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), weights));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), weights));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), weights));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), weights));
        }
        __m256i lo = _mm256_packs_epi32(_mm256_sra_epi32(s0, count), _mm256_sra_epi32(s1, count));
        __m256i hi = _mm256_packs_epi32(_mm256_sra_epi32(s2, count), _mm256_sra_epi32(s3, count));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(lo, hi));
    }
}

#endif
