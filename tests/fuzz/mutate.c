/* Where there is no libFuzzer: seeds from the files named, changed at random, for some seconds. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state = 88172645463325252u;

static uint32_t draw(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % (below ? below : 1);
}

static size_t change(uint8_t *data, size_t size) {
    size_t at = draw((uint32_t)size), length = 1 + draw(16);
    if (at + length > size) length = size - at;
    switch (draw(5)) {
    case 0: data[at] = (uint8_t)draw(256); break;
    case 1: data[at] ^= (uint8_t)(1 << draw(8)); break;
    case 2: memset(data + at, draw(2) ? 0xff : 0, length); break;
    case 3: memmove(data + at, data + at + length, size - at - length); return size - length;
    default: memmove(data + at, data + draw((uint32_t)(size - length + 1)), length);
    }
    return size;
}

int main(int count, char **names) {
    long executions = 0;
    time_t end = time(NULL) + atoi(names[1]);
    while (time(NULL) < end) {
        FILE *file = fopen(names[2 + draw((uint32_t)count - 2)], "rb");
        static uint8_t seed[1 << 16], data[1 << 16];
        size_t size = file ? fread(seed, 1, sizeof seed, file) : 0;
        if (file) fclose(file);
        for (int i = 0; size > 12 && i < 100; i++, executions++) {
            memcpy(data, seed, size);
            size_t now = size;
            for (uint32_t n = draw(6); n && now > 12; n--) now = change(data, now);
            LLVMFuzzerTestOneInput(data, now);
        }
    }
    printf("stat::number_of_executed_units: %ld\n", executions);
    return 0;
}
