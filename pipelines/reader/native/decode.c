/* From a JPEG file to the pixels of a crop: what is needed of it, and from its samples to rows of colour, resized. */
#include <stdlib.h>
#include <string.h>

#include "decoder.h"

void *vit_grow(void *memory, size_t *capacity, size_t size) {
    if (size <= *capacity && memory) return memory;
    free(memory);
    *capacity = (size + size / 4 + 63) / 64 * 64;
    memory = aligned_alloc(64, *capacity);
    if (!memory) *capacity = 0;
    return memory;
}

int vit_has_simd(void) {
#ifdef VIT_X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}

vit_decoder *vit_new_decoder(int simd) {
    size_t size = (sizeof(vit_decoder) + 63) / 64 * 64;
    vit_decoder *d = aligned_alloc(64, size);
    if (!d) return NULL;
    memset(d, 0, size);
    d->decode_block = vit_decode_block_scalar;
    d->skip_block = vit_skip_block_scalar;
    d->idct_8x8 = vit_idct_8x8_scalar;
    d->upsample = vit_upsample_scalar;
    d->to_rgbx = vit_to_rgbx_scalar;
    d->resample_rows = vit_resample_rows_scalar;
    d->resample_column = vit_resample_column_scalar;
#ifdef VIT_X86
    if (simd && vit_has_simd()) {
        d->decode_block = vit_decode_block_avx2;
        d->skip_block = vit_skip_block_avx2;
        d->idct_8x8 = vit_idct_8x8_avx2;
        d->upsample = vit_upsample_avx2;
        d->to_rgbx = vit_to_rgbx_avx2;
        d->resample_rows = vit_resample_rows_avx2;
        d->resample_column = vit_resample_column_avx2;
    }
#else
    (void)simd;
#endif
    return d;
}

void vit_free_decoder(vit_decoder *d) {
    if (!d) return;
    for (int i = 0; i < 3; i++) free(d->planes[i].memory);
    vit_filter *filters[2] = {&d->across, &d->down};
    for (int i = 0; i < 2; i++) {
        free(filters[i]->start);
        free(filters[i]->weights);
    }
    free(d->data);
    free(d->segments);
    free(d->rows);
    free(d->narrow);
    free(d);
}

static size_t align(size_t size) { return (size + 31) / 32 * 32; }

/* What is needed ------------------------------------------------------------------------------------------------- */

/* Whether chroma has half the samples of luma across, and down. */
static int is_wider(const vit_plane *luma, const vit_plane *chroma) { return luma->h * luma->block > chroma->block; }
static int is_taller(const vit_plane *luma, const vit_plane *chroma) { return luma->v * luma->block > chroma->block; }

static int lay_out(vit_decoder *d, const vit_crop *crop) {
    const vit_header *header = &d->header;
    int n = header->num_components, block = 8 / crop->scale;
    vit_plane *luma = &d->planes[0];
    for (int i = 0; i < n; i++) {
        vit_plane *p = &d->planes[i];
        p->h = i ? 1 : header->h;
        p->v = i ? 1 : header->v;
        p->block = block;
        /* As libjpeg: chroma of 4:2:0 is shrunk one step less, and needs no widening then. */
        if (i && block < 8 && header->h == 2 && header->v == 2) p->block = 2 * block;
        p->width = vit_ceil_div(header->width * p->h * p->block, header->h * 8);
        p->height = vit_ceil_div(header->height * p->v * p->block, header->v * 8);
    }
    if (crop->x < 0 || crop->y < 0 || crop->width < 1 || crop->height < 1) return VIT_NO_BOX;
    if (crop->width > luma->width - crop->x || crop->height > luma->height - crop->y) return VIT_NO_BOX;
    int margin = n == 3 && is_wider(luma, &d->planes[1]);

    vit_area *a = &d->area;
    int mcu_width = luma->h * block, mcu_height = luma->v * block;
    a->per_row = vit_ceil_div(header->width, 8 * luma->h);
    a->total = a->per_row * vit_ceil_div(header->height, 8 * luma->v);
    a->interval = header->restart_interval ? header->restart_interval : a->total;
    /* The filter that widens chroma looks one sample further. */
    a->column = crop->x > margin ? (crop->x - margin) / mcu_width : 0;
    a->row = crop->y > margin ? (crop->y - margin) / mcu_height : 0;
    a->end_column = vit_ceil_div(crop->x + crop->width + margin, mcu_width);
    a->end_row = vit_ceil_div(crop->y + crop->height + margin, mcu_height);
    if (a->end_column > a->per_row) a->end_column = a->per_row;
    if (a->end_row > a->total / a->per_row) a->end_row = a->total / a->per_row;

    for (int i = 0; i < n; i++) {
        vit_plane *p = &d->planes[i];
        int columns = (a->end_column - a->column) * p->h * p->block, rows = (a->end_row - a->row) * p->v * p->block;
        p->x = a->column * p->h * p->block;
        p->y = a->row * p->v * p->block;
        p->stride = (ptrdiff_t)align(32 + (size_t)columns + 32); /* vector loads run over */
        p->memory = vit_grow(p->memory, &p->capacity, (size_t)p->stride * (size_t)rows + 64);
        if (!p->memory) return VIT_NO_MEMORY;
        p->samples = p->memory + 32;
    }
    return VIT_OK;
}

static int prepare_tables(vit_decoder *d) {
    const vit_header *header = &d->header;
    for (int i = 0; i < header->num_components; i++) {
        const vit_component *c = &header->component[i];
        memcpy(d->quant[c->quant], header->quant[c->quant], sizeof header->quant[0]);
        int status = vit_build_huffman(&d->tables[0][c->dc], header->huffman[0][c->dc], 0);
        if (status == VIT_OK) status = vit_build_huffman(&d->tables[1][c->ac], header->huffman[1][c->ac], 1);
        if (status != VIT_OK) return status;
    }
    return VIT_OK;
}

/* Rows ----------------------------------------------------------------------------------------------------------- */

/* Repeat the outermost samples of the image, for the filter that widens chroma. */
static void extend_edges(const vit_decoder *d, const vit_plane *p) {
    int rows = (d->area.end_row - d->area.row) * p->block, right = p->width - p->x;
    int has_right = d->area.end_column == d->area.per_row;
    for (int y = 0; y < rows; y++) {
        uint8_t *row = p->samples + y * p->stride;
        if (p->x == 0) row[-1] = row[0];
        if (has_right) row[right] = row[right - 1];
    }
}

static const uint8_t *sample(const vit_plane *p, int x, int y) {
    if (y < 0) y = 0;
    if (y >= p->height) y = p->height - 1;
    return p->samples + (y - p->y) * p->stride + (x - p->x);
}

/* One row of the crop in colour. work holds two rows of chroma and the sums; returns the first pixel. */
static const uint8_t *colour_row(const vit_decoder *d, const vit_crop *crop, int y, uint8_t *work, size_t room,
                                 uint8_t *out) {
    const vit_plane *luma = &d->planes[0], *chroma = &d->planes[1];
    if (d->header.num_components == 1) {
        vit_grey_to_rgbx(sample(luma, crop->x, y), crop->width, out);
        return out;
    }
    if (!is_wider(luma, chroma)) {
        d->to_rgbx(sample(luma, crop->x, y), sample(chroma, crop->x, y), sample(&d->planes[2], crop->x, y), crop->width,
                   out);
        return out;
    }
    int x = crop->x & ~1, width = crop->x + crop->width - x, pairs = (width + 1) / 2;
    uint8_t *wide[2] = {work, work + room};
    for (int i = 0; i < 2; i++) {
        const vit_plane *p = &d->planes[1 + i];
        if (luma->block == 1 || chroma->width <= 2) { /* here libjpeg repeats samples */
            const uint8_t *from = sample(p, x / 2, is_taller(luma, chroma) ? y / 2 : y);
            for (int k = 0; k < width; k++) wide[i][k] = from[k / 2];
        } else if (is_taller(luma, chroma)) {
            const uint8_t *far = sample(p, x / 2, y & 1 ? y / 2 + 1 : y / 2 - 1);
            d->upsample(sample(p, x / 2, y / 2), far, pairs, (uint16_t *)(work + 2 * room), wide[i]);
        } else {
            d->upsample(sample(p, x / 2, y), NULL, pairs, NULL, wide[i]);
        }
    }
    d->to_rgbx(sample(luma, x, y), wide[0], wide[1], width, out);
    return out + 4 * (crop->x - x);
}

static int resize(vit_decoder *d, const vit_crop *crop, int out_height, int out_width, int cubic, uint8_t *out) {
    int status = vit_make_filter(&d->across, crop->width, out_width, cubic, 4);
    if (status == VIT_OK) status = vit_make_filter(&d->down, crop->height, out_height, cubic, 2);
    if (status != VIT_OK) return status;
    /* Vector code reads and writes past the end of a row; the filter reads its padding taps. */
    size_t room = align((size_t)crop->width + 64), colour = 4 * align((size_t)crop->width + (size_t)d->across.taps + 32);
    size_t plane_stride = align((size_t)out_width), stride = 3 * plane_stride;
    d->rows = vit_grow(d->rows, &d->rows_capacity, 2 * colour + 2 * room + 2 * room + stride);
    d->narrow = vit_grow(d->narrow, &d->narrow_capacity, stride * ((size_t)crop->height + (size_t)d->down.taps) + 64);
    if (!d->rows || !d->narrow) return VIT_NO_MEMORY;
    uint8_t *work = d->rows + 2 * colour, *tail = work + 4 * room;
    for (int y = 0; y < crop->height; y += 2) {
        int is_single = y + 1 == crop->height;
        const uint8_t *row[2];
        uint8_t *narrow[2] = {d->narrow + (size_t)y * stride, d->narrow + (size_t)(y + !is_single) * stride};
        row[0] = row[1] = colour_row(d, crop, crop->y + y, work, room, d->rows);
        if (!is_single) row[1] = colour_row(d, crop, crop->y + y + 1, work, room, d->rows + colour);
        d->resample_rows(&d->across, row, narrow, (int)plane_stride, crop->flip);
    }
    for (int y = 0; y < out_height; y++) {
        for (int c = 0; c < 3; c++) {
            uint8_t *to = out + ((size_t)c * (size_t)out_height + (size_t)y) * (size_t)out_width;
            uint8_t *row = out_width % 32 ? tail : to;
            d->resample_column(&d->down, y, d->narrow + (size_t)c * plane_stride, (ptrdiff_t)stride, out_width, row);
            if (row != to) memcpy(to, row, (size_t)out_width);
        }
    }
    return VIT_OK;
}

int vit_decode(vit_decoder *d, const uint8_t *data, size_t size, const vit_crop *crop, int out_height, int out_width,
               int cubic, uint8_t *out) {
    int status = vit_read_header(data, size, &d->header);
    if (status == VIT_OK) status = lay_out(d, crop);
    if (status == VIT_OK) status = prepare_tables(d);
    if (status == VIT_OK) status = vit_decode_scan(d);
    if (status != VIT_OK) return status;
    if (d->header.num_components == 3 && is_wider(&d->planes[0], &d->planes[1])) {
        extend_edges(d, &d->planes[1]);
        extend_edges(d, &d->planes[2]);
    }
    return resize(d, crop, out_height, out_width, cubic, out);
}
