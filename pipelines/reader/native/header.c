/* JPEG markers up to the image data. Whatever is unusual is left to others: see vit_read_header. */
#include <string.h>

#include "native.h"

enum { SOF0 = 0xc0, SOF1 = 0xc1, DHT = 0xc4, SOI = 0xd8, EOI = 0xd9, SOS = 0xda, DQT = 0xdb, DRI = 0xdd };
enum { APP0 = 0xe0, APP1 = 0xe1, APP14 = 0xee, APP15 = 0xef, COM = 0xfe };

typedef struct {
    vit_header *header;
    int ids[3];
    int has_frame, has_jfif, has_adobe, adobe_transform, num_exif;
} parser;

static int be16(const uint8_t *p) { return p[0] << 8 | p[1]; }

static int read_quant(parser *state, const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        int is_wide = *p >> 4, number = *p & 15;
        p++;
        if (is_wide > 1 || number > 3 || end - p < 64 * (1 + is_wide)) return VIT_DAMAGED;
        for (int i = 0; i < 64; i++, p += 1 + is_wide) {
            int value = is_wide ? be16(p) : *p;
            if (!value) return VIT_DAMAGED;
            state->header->quant[number][i] = (uint16_t)value;
        }
    }
    return VIT_OK;
}

static int read_huffman(parser *state, const uint8_t *p, const uint8_t *end) {
    while (p < end) {
        int is_ac = *p >> 4, number = *p & 15, total = 0;
        p++;
        if (is_ac > 1 || number > 3 || end - p < 16) return VIT_DAMAGED;
        for (int i = 0; i < 16; i++) total += p[i];
        if (total > 256 || end - p < 16 + total) return VIT_DAMAGED;
        state->header->huffman[is_ac][number] = p;
        p += 16 + total;
    }
    return VIT_OK;
}

static int read_frame(parser *state, const uint8_t *p, const uint8_t *end) {
    vit_header *header = state->header;
    if (state->has_frame || end - p < 6) return VIT_DAMAGED;
    header->height = be16(p + 1);
    header->width = be16(p + 3);
    header->num_components = p[5];
    if (p[0] != 8 || (p[5] != 1 && p[5] != 3) || !header->width || !header->height) return VIT_NOT_PLAIN;
    if ((int64_t)header->width * header->height > VIT_MAX_PIXELS) return VIT_NOT_PLAIN;
    p += 6;
    if (end - p != 3 * header->num_components) return VIT_DAMAGED;
    for (int i = 0; i < header->num_components; i++, p += 3) {
        int h = p[1] >> 4, v = p[1] & 15;
        state->ids[i] = p[0];
        header->component[i].quant = p[2];
        if (p[2] > 3) return VIT_DAMAGED;
        if (i == 0) {
            header->h = h;
            header->v = v;
        } else if (h != 1 || v != 1) {
            return VIT_NOT_PLAIN;
        }
    }
    /* 4:4:4, 4:2:2 and 4:2:0. */
    if (header->h < 1 || header->h > 2 || header->v < 1 || header->v > header->h) return VIT_NOT_PLAIN;
    if (header->num_components == 1 && (header->h != 1 || header->v != 1)) return VIT_NOT_PLAIN;
    state->has_frame = 1;
    return VIT_OK;
}

static int tiff16(const uint8_t *p, int is_little) { return is_little ? p[1] << 8 | p[0] : be16(p); }

static uint32_t tiff32(const uint8_t *p, int is_little) {
    uint32_t a = (uint32_t)tiff16(p, is_little), b = (uint32_t)tiff16(p + 2, is_little);
    return is_little ? b << 16 | a : a << 16 | b;
}

/* Whether the first directory of a TIFF block surely says nothing of a rotation. */
static int is_upright(const uint8_t *tiff, size_t size) {
    int is_little = size >= 8 && !memcmp(tiff, "II*\0", 4);
    if (size < 8 || (!is_little && memcmp(tiff, "MM\0*", 4))) return 0;
    size_t at = tiff32(tiff + 4, is_little);
    if (at > size - 2) return 0;
    size_t count = (size_t)tiff16(tiff + at, is_little);
    if (count * 12 > size - at - 2) return 0;
    for (const uint8_t *entry = tiff + at + 2; count; count--, entry += 12) {
        if (tiff16(entry, is_little) != 0x0112) continue;
        if (tiff16(entry + 2, is_little) != 3 || tiff32(entry + 4, is_little) != 1) return 0;
        if (tiff16(entry + 8, is_little) != 1) return 0;
    }
    return 1;
}

static int contains(const uint8_t *p, const uint8_t *end, const char *word) {
    size_t size = strlen(word);
    for (; (size_t)(end - p) >= size; p++) {
        p = memchr(p, word[0], (size_t)(end - p) - size + 1);
        if (!p) return 0;
        if (!memcmp(p, word, size)) return 1;
    }
    return 0;
}

static int read_application(parser *state, int marker, const uint8_t *p, const uint8_t *end) {
    size_t size = (size_t)(end - p);
    if (marker == APP0 && size >= 14 && !memcmp(p, "JFIF\0", 5)) {
        if (p[5] != 1) return VIT_NOT_PLAIN;
        state->has_jfif = 1;
    } else if (marker == APP14 && size >= 12 && !memcmp(p, "Adobe", 5)) {
        state->has_adobe = 1;
        state->adobe_transform = p[11];
    } else if (marker == APP1 && size >= 6 && !memcmp(p, "Exif\0\0", 6)) {
        if (state->num_exif++ || !is_upright(p + 6, size - 6)) return VIT_NOT_PLAIN;
    } else if (marker == APP1 && contains(p, end, "Orientation")) { /* XMP */
        return VIT_NOT_PLAIN;
    }
    return VIT_OK;
}

/* Whether libjpeg would take three components for Y Cb Cr. */
static int is_ycc(const parser *state) {
    if (state->has_jfif) return 1;
    if (state->has_adobe) return state->adobe_transform == 1;
    return !(state->ids[0] == 'R' && state->ids[1] == 'G' && state->ids[2] == 'B');
}

/* All components in one sequential scan. */
static int read_scan(parser *state, const uint8_t *p, const uint8_t *end) {
    vit_header *header = state->header;
    int n = header->num_components;
    if (!state->has_frame || end - p < 1) return VIT_DAMAGED;
    if (p[0] != n || end - p != 4 + 2 * n) return VIT_NOT_PLAIN;
    for (int i = 0; i < n; i++) {
        vit_component *component = &header->component[i];
        component->dc = p[2 + 2 * i] >> 4;
        component->ac = p[2 + 2 * i] & 15;
        if (p[1 + 2 * i] != state->ids[i]) return VIT_NOT_PLAIN;
        if (component->dc > 3 || component->ac > 3) return VIT_DAMAGED;
        if (!header->huffman[0][component->dc] || !header->huffman[1][component->ac]) return VIT_DAMAGED;
        if (!header->quant[component->quant][0]) return VIT_DAMAGED;
    }
    if (p[1 + 2 * n] != 0 || p[2 + 2 * n] != 63 || p[3 + 2 * n] != 0) return VIT_NOT_PLAIN;
    return n == 1 || is_ycc(state) ? VIT_OK : VIT_NOT_PLAIN;
}

static int read_segment(parser *state, int marker, const uint8_t *p, const uint8_t *end) {
    if (marker >= APP0 && marker <= APP15) return read_application(state, marker, p, end);
    switch (marker) {
    case SOF0:
    case SOF1: return read_frame(state, p, end);
    case DHT: return read_huffman(state, p, end);
    case DQT: return read_quant(state, p, end);
    case SOS: return read_scan(state, p, end);
    case COM: return VIT_OK;
    case DRI:
        if (end - p != 2) return VIT_DAMAGED;
        state->header->restart_interval = be16(p);
        return VIT_OK;
    default: return VIT_NOT_PLAIN; /* progressive, arithmetic, lossless, DNL, ... */
    }
}

int vit_read_header(const uint8_t *data, size_t size, vit_header *header) {
    parser state = {.header = header};
    memset(header, 0, sizeof *header);
    if (size < 4 || data[0] != 0xff || data[1] != SOI) return VIT_NOT_PLAIN;
    if (data[size - 2] != 0xff || data[size - 1] != EOI) return VIT_DAMAGED;
    const uint8_t *p = data + 2, *end = data + size - 2;
    for (;;) {
        if (end - p < 4 || p[0] != 0xff) return VIT_DAMAGED;
        while (p[1] == 0xff) { /* fill bytes */
            if (end - ++p < 4) return VIT_DAMAGED;
        }
        int marker = p[1], length = be16(p + 2);
        if (marker < SOF0 || length < 2 || end - p < 2 + length) return VIT_DAMAGED;
        int status = read_segment(&state, marker, p + 4, p + 2 + length);
        if (status != VIT_OK) return status;
        p += 2 + length;
        if (marker == SOS) break;
    }
    header->scan = p;
    header->end = end;
    return VIT_OK;
}
