/* What a decoder holds; shared by decode.c and scan.c. */
#ifndef VIT_DECODER_H
#define VIT_DECODER_H

#include "native.h"

/* Samples of one component over the needed MCUs. */
typedef struct {
    uint8_t *memory, *samples; /* samples: the first needed one; one may be read to its left */
    size_t capacity;
    ptrdiff_t stride;
    int block;         /* side of a transformed block: 1, 2, 4 or 8 */
    int h, v;          /* blocks of an MCU */
    int x, y;          /* place of samples[0] in the component */
    int width, height; /* of the whole component */
} vit_plane;

/* MCUs [column, end_column) x [row, end_row) are needed. */
typedef struct {
    int per_row, total, interval; /* interval: MCUs of a segment */
    int column, end_column, row, end_row;
} vit_area;

struct vit_decoder {
    vit_decode_block *decode_block;
    vit_skip_block *skip_block;
    vit_idct_pair *idct_8x8;
    vit_upsample *upsample;
    vit_to_rgbx *to_rgbx;
    vit_resample_rows *resample_rows;
    vit_resample_column *resample_column;

    vit_header header;
    vit_area area;
    vit_huffman tables[2][4];
    uint16_t quant[4][80];
    vit_plane planes[3];
    vit_filter across, down;
    uint8_t *data, *rows, *narrow; /* entropy-coded bytes; rows of colour; rows resized across */
    uint32_t *segments;            /* [segment], [segment + 1]: its bytes in data */
    size_t data_capacity, segments_capacity, rows_capacity, narrow_capacity;

    /* Blocks are transformed two at a time. */
    _Alignas(32) int16_t pair[PAIR_SIZE];
    uint8_t *pair_out[2];
    ptrdiff_t pair_stride[2];
    int waiting;
};

static inline int vit_ceil_div(int a, int b) { return (int)(((int64_t)a + b - 1) / b); }

/* Decode the blocks of the needed MCUs into the planes. */
int vit_decode_scan(vit_decoder *decoder);

#endif
