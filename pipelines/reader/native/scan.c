/* Entropy-coded data to samples: only the segments that hold needed MCUs, only their blocks transformed. */
#include <string.h>

#include "decoder.h"

/* Segments ------------------------------------------------------------------------------------------------------- */

/* Whether any needed MCU lies in [first, end). */
static int is_needed(const vit_area *a, int first, int end) {
    int row = first / a->per_row, last_row = (end - 1) / a->per_row;
    if (row < a->row) row = a->row;
    if (last_row >= a->end_row) last_row = a->end_row - 1;
    for (; row <= last_row; row++) {
        int from = row * a->per_row + a->column, to = row * a->per_row + a->end_column;
        if (from < end && to > first) return 1;
        if (last_row - row > 1) return 1; /* a whole row lies between */
    }
    return 0;
}

static int segment_end(const vit_area *a, int first) {
    return a->interval < a->total - first ? first + a->interval : a->total;
}

/* Copy what is needed of the entropy-coded data without its stuffing; restart markers part it into segments. */
static int collect(vit_decoder *d) {
    const vit_area *a = &d->area;
    const uint8_t *p = d->header.scan, *end = d->header.end;
    int num_segments = vit_ceil_div(a->total, a->interval), last = (a->end_row - 1) * a->per_row + a->end_column - 1;
    size_t used = 0;
    d->data = vit_grow(d->data, &d->data_capacity, (size_t)(end - p) + ENTROPY_PADDING);
    d->segments = vit_grow(d->segments, &d->segments_capacity, ((size_t)num_segments + 1) * sizeof *d->segments);
    if (!d->data || !d->segments) return VIT_NO_MEMORY;
    for (int s = 0, first = 0;; s++, first += a->interval) {
        int needed = is_needed(a, first, segment_end(a, first)), is_last = s == num_segments - 1;
        d->segments[s] = (uint32_t)used;
        for (;;) {
            const uint8_t *q = memchr(p, 0xff, (size_t)(end - p));
            size_t size = (size_t)((q ? q : end) - p);
            if (q && q + 1 < end && !q[1]) size++; /* 0xff is data, the 0 after it is not */
            if (needed) {
                memcpy(d->data + used, p, size);
                used += size;
            }
            if (!q) {
                p = end;
                break;
            }
            if (q + 1 == end) return VIT_DAMAGED;
            p = q + 2;
            if (!q[1]) continue;
            if (q[1] != (0xd0 | (s & 7))) return VIT_DAMAGED;
            if (is_last) return VIT_DAMAGED;
            break;
        }
        d->segments[s + 1] = (uint32_t)used;
        if (is_last || last < segment_end(a, first)) break;
        if (p == end) return VIT_DAMAGED; /* segments are missing */
    }
    memset(d->data + used, 0, ENTROPY_PADDING);
    return VIT_OK;
}

/* Blocks --------------------------------------------------------------------------------------------------------- */

static void transform_pair(vit_decoder *d) {
    if (!d->waiting) return;
    if (d->waiting == 1) d->pair_out[1] = NULL;
    d->idct_8x8(d->pair, d->pair_out, d->pair_stride);
    memset(d->pair, 0, sizeof d->pair);
    d->waiting = 0;
}

static void fill(uint8_t *out, ptrdiff_t stride, int dc) {
    int value = (dc + 4) >> 3;
    value = value < -128 ? 0 : value > 127 ? 255 : value + 128;
    for (int y = 0; y < 8; y++, out += stride) memset(out, value, 8);
}

static int decode_block(vit_decoder *d, vit_bits *bits, int i, int *dc_value, uint8_t *out) {
    const vit_component *c = &d->header.component[i];
    const vit_plane *p = &d->planes[i];
    int half = d->waiting * 8;
    int last = d->decode_block(bits, &d->tables[0][c->dc], &d->tables[1][c->ac], d->quant[c->quant], dc_value, d->pair,
                               half);
    if (last < 0) return -1;
    if (p->block < 8) {
        vit_idct_reduced(d->pair + half, p->block, out, p->stride);
        /* The other half may wait for its transform. */
        for (int row = 0; row < 8; row++) memset(d->pair + half + 16 * row, 0, 8 * sizeof *d->pair);
    } else if (last == 0) {
        fill(out, p->stride, d->pair[half]);
        d->pair[half] = 0;
    } else {
        d->pair_out[d->waiting] = out;
        d->pair_stride[d->waiting] = p->stride;
        if (++d->waiting == 2) transform_pair(d);
    }
    return 0;
}

static int decode_mcu(vit_decoder *d, vit_bits *bits, int row, int column, int dc_values[3]) {
    for (int i = 0; i < d->header.num_components; i++) {
        const vit_plane *p = &d->planes[i];
        for (int v = 0; v < p->v; v++) {
            ptrdiff_t y = (ptrdiff_t)((row - d->area.row) * p->v + v) * p->block;
            for (int h = 0; h < p->h; h++) {
                ptrdiff_t x = (ptrdiff_t)((column - d->area.column) * p->h + h) * p->block;
                if (decode_block(d, bits, i, &dc_values[i], p->samples + y * p->stride + x)) return -1;
            }
        }
    }
    return 0;
}

static int skip_mcu(vit_decoder *d, vit_bits *bits, int dc_values[3]) {
    for (int i = 0; i < d->header.num_components; i++) {
        const vit_component *c = &d->header.component[i];
        for (int n = d->planes[i].h * d->planes[i].v; n; n--)
            if (d->skip_block(bits, &d->tables[0][c->dc], &d->tables[1][c->ac], &dc_values[i])) return -1;
    }
    return 0;
}

/* One segment up to the last needed MCU in it. */
static int decode_segment(vit_decoder *d, int first, int end, const uint8_t *begin, size_t size) {
    const vit_area *a = &d->area;
    vit_bits bits = {begin, 0, 0};
    int dc_values[3] = {0, 0, 0};
    int row = first / a->per_row, column = first % a->per_row;
    for (int m = first; m < end; m++) {
        int is_inside = row >= a->row && column >= a->column && column < a->end_column;
        if (is_inside ? decode_mcu(d, &bits, row, column, dc_values) : skip_mcu(d, &bits, dc_values)) return VIT_DAMAGED;
        ptrdiff_t left = (ptrdiff_t)size * 8 + bits.count - (bits.next - begin) * 8;
        if (left < 0) return VIT_DAMAGED;
        if (m == end - 1 && left > 7) return VIT_DAMAGED;
        column++;
        if (row >= a->row && column == a->end_column) {
            int next = row + 1 < a->end_row ? (row + 1) * a->per_row + a->column : a->total;
            if (next >= end) break;
        }
        if (column == a->per_row) {
            column = 0;
            row++;
        }
    }
    return VIT_OK;
}

int vit_decode_scan(vit_decoder *d) {
    const vit_area *a = &d->area;
    int collected = collect(d);
    if (collected != VIT_OK) return collected;
    memset(d->pair, 0, sizeof d->pair);
    d->waiting = 0;
    for (int s = 0, first = 0;; s++, first += a->interval) {
        int end = segment_end(a, first), status = VIT_OK;
        if (is_needed(a, first, end))
            status = decode_segment(d, first, end, d->data + d->segments[s], d->segments[s + 1] - d->segments[s]);
        if (status != VIT_OK) return status;
        if (end > (a->end_row - 1) * a->per_row + a->end_column - 1) break;
    }
    transform_pair(d);
    return VIT_OK;
}
