/* What the files of this extension share. Nothing here knows Python: the fuzz target is built from the same files.
 *
 * A JPEG becomes pixels of the model's size in one pass: only the blocks under the crop are transformed, rows are
 * resized while they are in the cache, and the result is written where the batch wants it. The pixels are those of
 * libjpeg-turbo (accurate integer DCT, fancy upsampling) followed by torch's antialiased uint8 resize, bit for bit.
 */
#ifndef VIT_NATIVE_H
#define VIT_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define VIT_X86 1
#define VIT_AVX2 __attribute__((target("avx2,bmi,bmi2")))
#endif

/* Why an image was not decoded. Another decoder, which knows more, gives the verdict on all but VIT_OK. */
enum {
    VIT_OK = 0,
    VIT_NOT_PLAIN = 1, /* a kind of JPEG, or no JPEG, that is left to others */
    VIT_DAMAGED = 2,   /* what was read breaks the format's rules */
    VIT_NO_MEMORY = 3,
    VIT_NO_BOX = 4, /* the crop is empty or leaves the image */
};

#define VIT_MAX_PIXELS (1 << 26)

/* Header -------------------------------------------------------------------------------------------------------- */

typedef struct {
    int quant, dc, ac; /* table numbers */
} vit_component;

typedef struct {
    int width, height;    /* px */
    int num_components;   /* 1: grey, 3: Y Cb Cr */
    int h, v;             /* luma blocks of an MCU, across and down; chroma has one */
    int restart_interval; /* MCUs; 0: none */
    vit_component component[3];
    uint16_t quant[4][64];        /* zigzag order */
    const uint8_t *huffman[2][4]; /* [AC][number]: 16 counts and the symbols, inside the file; NULL: absent */
    const uint8_t *scan, *end;    /* entropy-coded data, up to the end-of-image marker */
} vit_header;

/* Read everything before the image data. The file must end with its end-of-image marker: a cut file is VIT_DAMAGED. */
int vit_read_header(const uint8_t *data, size_t size, vit_header *header);

/* Entropy-coded data -------------------------------------------------------------------------------------------- */

#define FAST_BITS 10
#define BLOCK_PAIR 128              /* coefficients of two blocks, side by side: row r of both is at 16 r */
#define PAIR_SIZE (BLOCK_PAIR + 16) /* what runs off the end of either block goes behind both */
#define ENTROPY_PADDING 2048        /* bytes; an MCU of six blocks reads less than 1,600 */

typedef struct {
    uint32_t fast[1 << FAST_BITS]; /* one symbol with its value */
    uint16_t skip[1 << FAST_BITS]; /* as many whole symbols as fit, without values */
    uint32_t limit[17];            /* [length]: first 16-bit look-ahead that is no longer such a code */
    int32_t offset[17];            /* [length]: place of a code's symbol, less the code */
    uint8_t symbols[256];
    uint8_t definition[16 + 256]; /* what the tables were made from */
    int definition_size;
    int is_ac;
} vit_huffman;

typedef struct {
    const uint8_t *next;
    uint64_t bits; /* the next bits of the stream, from the top */
    int count;     /* how many of them are valid */
} vit_bits;

/* Make the tables from 16 counts and symbols, unless they are made from the same already. */
int vit_build_huffman(vit_huffman *table, const uint8_t *definition, int is_ac);

/* Decode a block into one half of a zeroed pair, dequantised. Returns the last place that is not 0 (0: DC alone), or
 * -1 if the data cannot be a block. quant has 80 entries; half is 0 or 8. */
typedef int vit_decode_block(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, const uint16_t *quant,
                             int *dc_value, int16_t *pair, int half);
/* Pass over a block. Returns 0 or -1. */
typedef int vit_skip_block(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, int *dc_value);

vit_decode_block vit_decode_block_scalar;
vit_skip_block vit_skip_block_scalar;

/* Transform ----------------------------------------------------------------------------------------------------- */

typedef void vit_idct_pair(const int16_t *pair, uint8_t *out[2], const ptrdiff_t stride[2]);

/* Two blocks to 8 x 8 pixels each; out[i] may be NULL. */
vit_idct_pair vit_idct_8x8_scalar;
/* One half of a pair (pair + 0 or pair + 8) to size x size pixels; size is 1, 2 or 4. */
void vit_idct_reduced(const int16_t *half, int size, uint8_t *out, ptrdiff_t stride);

/* Colour -------------------------------------------------------------------------------------------------------- */

/* Chroma of one row at full width: 2 n samples from near[-1 .. n] and far[-1 .. n], the rows next to it. sums holds
 * n + 2. far is NULL where chroma has all rows. */
typedef void vit_upsample(const uint8_t *near, const uint8_t *far, int n, uint16_t *sums, uint8_t *out);
/* n pixels to R G B 0. Writes up to 15 pixels more. */
typedef void vit_to_rgbx(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, int n, uint8_t *out);

vit_upsample vit_upsample_scalar;
vit_to_rgbx vit_to_rgbx_scalar;
void vit_grey_to_rgbx(const uint8_t *y, int n, uint8_t *out);

/* Resampling ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int size_out;
    int taps;         /* weights of one output, padded with 0 */
    int shift;        /* weights are fractions of 1 << shift */
    int32_t *start;   /* [size_out]: first input */
    int16_t *weights; /* [size_out][taps] */
    size_t start_capacity, weights_capacity;
} vit_filter;

/* Antialiased triangle (cubic: Keys, a = -0.5) filter; taps become a multiple of `multiple`. */
int vit_make_filter(vit_filter *filter, int size_in, int size_out, int cubic, int multiple);

/* Two rows of RGBX to two rows of three planes, each plane_stride apart; mirrored if flip. Reads taps - 1 pixels past
 * size_in and writes up to 3 samples past size_out. */
typedef void vit_resample_rows(const vit_filter *filter, const uint8_t *row[2], uint8_t *out[2], int plane_stride,
                               int flip);
/* One output row of `width` bytes from rows of in_stride bytes; y is the output row. May write up to 31 bytes more. */
typedef void vit_resample_column(const vit_filter *filter, int y, const uint8_t *rows, ptrdiff_t in_stride, int width,
                                 uint8_t *out);

vit_resample_rows vit_resample_rows_scalar;
vit_resample_column vit_resample_column_scalar;

#ifdef VIT_X86
vit_decode_block vit_decode_block_avx2;
vit_skip_block vit_skip_block_avx2;
vit_idct_pair vit_idct_8x8_avx2;
vit_upsample vit_upsample_avx2;
vit_to_rgbx vit_to_rgbx_avx2;
vit_resample_rows vit_resample_rows_avx2;
vit_resample_column vit_resample_column_avx2;
#endif

/* The whole ----------------------------------------------------------------------------------------------------- */

typedef struct {
    int scale;               /* 1, 2, 4 or 8: the image is decoded at 1 / scale */
    int x, y, width, height; /* crop in pixels of the scaled image */
    int flip;
} vit_crop;

typedef struct vit_decoder vit_decoder;

/* 1 if the vector code can run here. */
int vit_has_simd(void);
/* A decoder holds memory that grows to the largest image it has met; use it from one thread at a time. */
vit_decoder *vit_new_decoder(int simd);
void vit_free_decoder(vit_decoder *decoder);

/* Decode the crop to out: three planes of out_height x out_width bytes. */
int vit_decode(vit_decoder *decoder, const uint8_t *data, size_t size, const vit_crop *crop, int out_height,
               int out_width, int cubic, uint8_t *out);

/* Memory that is at least `size` bytes, 64-byte aligned; its old content is lost when it grows. NULL: none left. */
void *vit_grow(void *memory, size_t *capacity, size_t size);

#endif
