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
