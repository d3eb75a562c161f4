/* One hostile file through all of the C code. The first bytes choose crop and output; the rest is the file.
 *
 * Beside what the sanitizers see: vector and scalar code must agree, and a re-marked file must have the same pixels.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "tile.h"

enum { CHOICES = 10, MAX_PIXELS = 1 << 20 };

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

static int part(int size, int of_255) { return (int)((int64_t)size * of_255 / 256); }

static vit_crop choose(const uint8_t *choice, const vit_header *header) {
    vit_crop crop = {.scale = 1 << (choice[0] & 3), .flip = choice[1] & 1};
    int width = (header->width + crop.scale - 1) / crop.scale, height = (header->height + crop.scale - 1) / crop.scale;
    crop.x = part(width, choice[2]);
    crop.y = part(height, choice[3]);
    crop.width = part(width - crop.x, choice[4]) + 1;
    crop.height = part(height - crop.y, choice[5]) + 1;
    if (choice[1] & 128) crop.width += choice[6]; /* may leave the image */
    return crop;
}

/* Blocks read from each of the first bytes on, whatever stands there, into a pair that ends where its memory ends: inside
 * a decoder a write behind the pair meets its neighbour, and no sanitizer sees it. */
static void decode_blocks(const vit_header *header) {
    size_t size = (size_t)(header->end - header->scan), starts = size < 256 ? size : 256;
    const vit_component *component = &header->component[header->num_components - 1];
    uint16_t quant[80];
    for (int k = 0; k < 80; k++) quant[k] = 1;
    vit_huffman *tables = calloc(2, sizeof *tables);
    uint8_t *data = calloc(size + ENTROPY_PADDING, 1);
    memcpy(data, header->scan, size);
    if (!vit_build_huffman(&tables[0], header->huffman[0][component->dc], 0) &&
        !vit_build_huffman(&tables[1], header->huffman[1][component->ac], 1)) {
        for (size_t i = 0; i < 2 * starts; i++) {
            int dc[2] = {0, 0}, found[2];
            int16_t *pair[2];
            for (int simd = 0; simd < 2; simd++) {
                vit_decode_block *decode = vit_decode_block_scalar;
#ifdef VIT_X86
                if (simd && vit_has_simd()) decode = vit_decode_block_avx2;
#endif
                vit_bits bits = {data + i / 2, 0, 0};
                pair[simd] = calloc(PAIR_SIZE, sizeof *pair[simd]);
                found[simd] = decode(&bits, &tables[0], &tables[1], quant, &dc[simd], pair[simd], i & 1 ? 8 : 0);
            }
            if (found[0] != found[1] || memcmp(pair[0], pair[1], BLOCK_PAIR * sizeof *pair[0]))
                fail("vector and scalar code read different blocks");
            free(pair[0]);
            free(pair[1]);
        }
    }
    free(data);
    free(tables);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < CHOICES) return 0;
    const uint8_t *choice = data;
    size -= CHOICES;
    /* A copy of exactly this size: not a byte behind it may be read. */
    uint8_t *file = malloc(size ? size : 1);
    memcpy(file, data + CHOICES, size);
    vit_header header;
    vit_tiled tiled;
    int status = vit_read_header(file, size, &header), failed = vit_tile(file, size, 48, MAX_PIXELS, &tiled);
    if (status == VIT_OK) decode_blocks(&header);
    if (status == VIT_OK && (int64_t)header.width * header.height <= MAX_PIXELS) {
        vit_crop crop = choose(choice, &header);
        int height = 1 + choice[7] % 70, width = 1 + choice[8] % 70, cubic = choice[9] & 1;
        size_t bytes = (size_t)3 * height * width;
        uint8_t *out[3];
        int found[3];
        for (int i = 0; i < 3; i++) {
            vit_decoder *decoder = vit_new_decoder(i != 1);
            int is_tiled = i == 2 && !failed;
            out[i] = calloc(bytes, 1);
            found[i] = vit_decode(decoder, is_tiled ? tiled.data : file, is_tiled ? tiled.size : size, &crop, height,
                                  width, cubic, out[i]);
            vit_free_decoder(decoder);
        }
        if (found[0] != found[1]) fail("vector and scalar code give different verdicts");
        if (found[0] == VIT_OK && memcmp(out[0], out[1], bytes)) fail("vector and scalar code give different pixels");
        if (!failed && found[0] == VIT_OK && found[2] == VIT_OK && memcmp(out[0], out[2], bytes))
            fail("a re-marked file has other pixels");
        for (int i = 0; i < 3; i++) free(out[i]);
    }
    if (!failed) free(tiled.data);
    free(file);
    return 0;
}
