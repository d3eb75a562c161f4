/* Chroma to full resolution by libjpeg's triangle ("fancy") filter, and Y Cb Cr to R G B by its 16-bit constants. */
#include "native.h"

#ifdef VIT_X86
#include <immintrin.h>
#endif

/* The same loops serve both: with AVX2 the compiler makes vectors of them. */

static inline __attribute__((always_inline)) void upsample(const uint8_t *restrict near, const uint8_t *restrict far,
                                                           int n, uint16_t *restrict sums, uint8_t *restrict out) {
    if (!far) {
        for (int i = 0; i < n; i++) {
            out[2 * i] = (uint8_t)((3 * near[i] + near[i - 1] + 1) >> 2);
            out[2 * i + 1] = (uint8_t)((3 * near[i] + near[i + 1] + 2) >> 2);
        }
        return;
    }
    for (int i = 0; i < n + 2; i++) sums[i] = (uint16_t)(3 * near[i - 1] + far[i - 1]);
    for (int i = 0; i < n; i++) {
        uint16_t middle = (uint16_t)(3 * sums[i + 1]);
        out[2 * i] = (uint8_t)((uint16_t)(middle + sums[i] + 8) >> 4);
        out[2 * i + 1] = (uint8_t)((uint16_t)(middle + sums[i + 2] + 7) >> 4);
    }
}

void vit_upsample_scalar(const uint8_t *near, const uint8_t *far, int n, uint16_t *sums, uint8_t *out) {
    upsample(near, far, n, sums, out);
}

static inline uint8_t clamp(int x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

/* 1.402, 0.344136, 0.714136 and 1.772 times 65536. */
enum { CR_RED = 91881, CB_GREEN = 22554, CR_GREEN = 46802, CB_BLUE = 116130, HALF = 1 << 15 };

void vit_to_rgbx_scalar(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int n, uint8_t *out) {
    for (int i = 0; i < n; i++, out += 4) {
        int blue = cb[i] - 128, red = cr[i] - 128;
        out[0] = clamp(y[i] + ((CR_RED * red + HALF) >> 16));
        out[1] = clamp(y[i] + ((-CB_GREEN * blue - CR_GREEN * red + HALF) >> 16));
        out[2] = clamp(y[i] + ((CB_BLUE * blue + HALF) >> 16));
        out[3] = 0;
    }
}

void vit_grey_to_rgbx(const uint8_t *y, int n, uint8_t *out) {
    for (int i = 0; i < n; i++, out += 4) {
        out[0] = out[1] = out[2] = y[i];
        out[3] = 0;
    }
}

#ifdef VIT_X86

VIT_AVX2 void vit_upsample_avx2(const uint8_t *near, const uint8_t *far, int n, uint16_t *sums, uint8_t *out) {
    upsample(near, far, n, sums, out);
}

/* (c x + HALF) >> 16 for |c| < 1 << 15, twice x at hand: the high half of a product, rounded. */
VIT_AVX2 static inline __m256i scaled(__m256i twice, int c) {
    __m256i high = _mm256_mulhi_epi16(twice, _mm256_set1_epi16((short)c));
    return _mm256_srai_epi16(_mm256_add_epi16(high, _mm256_set1_epi16(1)), 1);
}

VIT_AVX2 void vit_to_rgbx_avx2(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int n, uint8_t *out) {
    const __m256i middle = _mm256_set1_epi16(128), half = _mm256_set1_epi32(HALF);
    /* Constants beyond 16 bits as a whole number and the rest. */
    const __m256i green = _mm256_set1_epi32((int)((uint32_t)(65536 - CR_GREEN) << 16 | (uint16_t)-CB_GREEN));
    for (int i = 0; i < n; i += 16, out += 64) {
        __m256i luma = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(y + i)));
        __m256i blue = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cb + i)));
        __m256i red = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(cr + i)));
        blue = _mm256_sub_epi16(blue, middle);
        red = _mm256_sub_epi16(red, middle);
        __m256i twice_blue = _mm256_add_epi16(blue, blue), twice_red = _mm256_add_epi16(red, red);
        __m256i r = _mm256_add_epi16(_mm256_add_epi16(luma, red), scaled(twice_red, CR_RED - 65536));
        __m256i b = _mm256_add_epi16(_mm256_add_epi16(luma, twice_blue), scaled(twice_blue, CB_BLUE - 131072));
        __m256i g_lo = _mm256_madd_epi16(_mm256_unpacklo_epi16(blue, red), green);
        __m256i g_hi = _mm256_madd_epi16(_mm256_unpackhi_epi16(blue, red), green);
        g_lo = _mm256_srai_epi32(_mm256_add_epi32(g_lo, half), 16);
        g_hi = _mm256_srai_epi32(_mm256_add_epi32(g_hi, half), 16);
        __m256i g = _mm256_add_epi16(_mm256_sub_epi16(luma, red), _mm256_packs_epi32(g_lo, g_hi));
        __m256i rg = _mm256_packus_epi16(r, g), b0 = _mm256_packus_epi16(b, _mm256_setzero_si256());
        rg = _mm256_unpacklo_epi8(rg, _mm256_srli_si256(rg, 8));
        b0 = _mm256_unpacklo_epi8(b0, _mm256_setzero_si256());
        __m256i even = _mm256_unpacklo_epi16(rg, b0), odd = _mm256_unpackhi_epi16(rg, b0);
        _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

#endif
