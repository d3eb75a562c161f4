/* Lossless re-marking of a JPEG file. Nothing here knows Python: the fuzz target is built from the same file. */
#ifndef VIT_TILE_H
#define VIT_TILE_H

#include <stddef.h>

typedef struct {
    unsigned char *data; /* to be freed */
    size_t size;
    char message[256]; /* why not */
} vit_tiled;

/* The same coefficients as a baseline file with a restart marker about every tile_pixels pixels of a row of blocks.
 * Returns 0, or 1 for a file that is damaged, larger than max_pixels or not of one or three components. */
int vit_tile(const unsigned char *data, size_t size, int tile_pixels, long max_pixels, vit_tiled *result);

#endif
