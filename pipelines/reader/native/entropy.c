/* Huffman-coded blocks.
 *
 * The reader keeps at least 56 valid bits at the top of a 64-bit word, refilled without a branch from data whose
 * stuffing bytes are gone. One look-up of FAST_BITS bits gives a whole coefficient: zero run, value, and bits used.
 * Blocks outside the crop are passed over with a second table, whose one look-up covers several coefficients.
 */
#include <string.h>

#include "native.h"

/* Entries of `fast`: bits 0-5 how many bits to consume, bit 6 COEFFICIENT, bit 7 END, bits 8-15 zero run (or the whole
 * symbol where the value did not fit), bits 16-31 value; 0: a longer code.
 * Entries of `skip`: bits 0-5 bits to consume, bit 6 END, bits 8-15 places covered; 0: look in `fast`. */
enum { COEFFICIENT = 1 << 6, END = 1 << 7, SKIP_END = 1 << 6 };

/* Place in a pair of the k-th coefficient of the zigzag; runs off the end go behind the pair. */
#define AT(row, column) ((row) * 16 + (column))
static const uint8_t position[80] = {
    AT(0, 0), AT(0, 1), AT(1, 0), AT(2, 0), AT(1, 1), AT(0, 2), AT(0, 3), AT(1, 2), AT(2, 1), AT(3, 0),
    AT(4, 0), AT(3, 1), AT(2, 2), AT(1, 3), AT(0, 4), AT(0, 5), AT(1, 4), AT(2, 3), AT(3, 2), AT(4, 1),
    AT(5, 0), AT(6, 0), AT(5, 1), AT(4, 2), AT(3, 3), AT(2, 4), AT(1, 5), AT(0, 6), AT(0, 7), AT(1, 6),
    AT(2, 5), AT(3, 4), AT(4, 3), AT(5, 2), AT(6, 1), AT(7, 0), AT(7, 1), AT(6, 2), AT(5, 3), AT(4, 4),
    AT(3, 5), AT(2, 6), AT(1, 7), AT(2, 7), AT(3, 6), AT(4, 5), AT(5, 4), AT(6, 3), AT(7, 2), AT(7, 3),
    AT(6, 4), AT(5, 5), AT(4, 6), AT(3, 7), AT(4, 7), AT(5, 6), AT(6, 5), AT(7, 4), AT(7, 5), AT(6, 6),
    AT(5, 7), AT(6, 7), AT(7, 6), AT(7, 7), 128,      128,      128,      128,      128,      128,
    128,      128,      128,      128,      128,      128,      128,      128,      128,      128,
};

_Static_assert(BLOCK_PAIR + 8 < PAIR_SIZE, "place 128 of a pair's second block, which begins 8 behind the first");

/* A magnitude of `size` bits, 1 to 15. */
static inline int extend(uint32_t magnitude, int size) {
    int value = (int)magnitude;
    return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

static int is_known(const vit_huffman *table, const uint8_t *definition, int size, int is_ac) {
    return table->definition_size == size && table->is_ac == is_ac && !memcmp(table->definition, definition, size);
}

static uint32_t fast_entry(int symbol, int length, uint32_t rest, int is_ac) {
    int run = is_ac ? symbol >> 4 : 0, size = is_ac ? symbol & 15 : symbol;
    if (is_ac && symbol == 0) return (uint32_t)length | END;
    if (is_ac && size == 0 && run != 15) return 0; /* means nothing outside progressive files */
    if (size == 0 && is_ac) return (uint32_t)length | (uint32_t)symbol << 8;
    if (length + size > FAST_BITS) return (uint32_t)length | (uint32_t)symbol << 8;
    int value = size ? extend(rest >> (FAST_BITS - length - size), size) : 0;
    return (uint32_t)(length + size) | COEFFICIENT | (uint32_t)run << 8 | (uint32_t)(uint16_t)value << 16;
}

static void fill_skip(vit_huffman *table) {
    for (uint32_t look = 0; look < 1 << FAST_BITS; look++) {
        int used = 0, places = 0;
        uint32_t end = 0;
        while (used < FAST_BITS && !end) {
            uint32_t entry = table->fast[look << used & ((1 << FAST_BITS) - 1)];
            int length = (int)(entry & 63), run = (int)(entry >> 8 & 15);
            if (!(entry & (COEFFICIENT | END))) {
                run = (int)(entry >> 12 & 15);
                length += (int)(entry >> 8 & 15);
            }
            /* The code itself must lie in the look-ahead; its magnitude need not. */
            if (!entry || used + (int)(entry & 63) > FAST_BITS) break;
            used += length;
            if (entry & END) {
                end = SKIP_END;
            } else {
                places += run + 1;
            }
        }
        table->skip[look] = used ? (uint16_t)((uint32_t)used | end | (uint32_t)places << 8) : 0;
    }
}

int vit_build_huffman(vit_huffman *table, const uint8_t *definition, int is_ac) {
    int total = 0;
    for (int i = 0; i < 16; i++) total += definition[i];
    if (is_known(table, definition, 16 + total, is_ac)) return VIT_OK;
    table->definition_size = 0;
    memcpy(table->symbols, definition + 16, (size_t)total);
    memset(table->fast, 0, sizeof table->fast);
    uint32_t code = 0;
    for (int length = 1, k = 0; length <= 16; length++, code <<= 1) {
        table->offset[length] = k - (int32_t)code;
        for (int i = 0; i < definition[length - 1]; i++, k++, code++) {
            int symbol = table->symbols[k];
            if (!is_ac && symbol > 15) return VIT_DAMAGED;
            if (length > FAST_BITS) continue;
            uint32_t first = code << (FAST_BITS - length);
            if (first + (1u << (FAST_BITS - length)) > 1 << FAST_BITS) return VIT_DAMAGED;
            for (uint32_t rest = 0; rest < 1u << (FAST_BITS - length); rest++)
                table->fast[first + rest] = fast_entry(symbol, length, rest, is_ac);
        }
        if (code >= 1u << length) return VIT_DAMAGED; /* no code is all ones */
        table->limit[length] = code << (16 - length);
    }
    if (is_ac) fill_skip(table);
    memcpy(table->definition, definition, (size_t)(16 + total));
    table->definition_size = 16 + total;
    table->is_ac = is_ac;
    return VIT_OK;
}

static inline uint64_t load_be64(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* At least 56 valid bits. Bits below `count` may be there already: they are the same bits. */
#define REFILL(b)                                                                                                      \
    ((b).bits |= load_be64((b).next) >> (b).count, (b).next += (63 - (b).count) >> 3, (b).count |= 56)
#define CONSUME(b, n) ((b).bits <<= (n) & 63, (b).count -= (int)((n) & 63))
#define LOOK(b) ((b).bits >> (64 - FAST_BITS))

/* Any symbol, after a refill. Consumes its code; -1: no such code. */
static int slow_symbol(vit_bits *b, const vit_huffman *table) {
    uint32_t look = (uint32_t)(b->bits >> 48);
    for (int length = 1; length <= 16; length++) {
        if (look < table->limit[length]) {
            int k = (int)(look >> (16 - length)) + table->offset[length];
            if (k < 0 || k > 255) return -1;
            CONSUME(*b, length);
            return table->symbols[k];
        }
    }
    return -1;
}

/* Magnitude of `size` bits, 1 to 15; at most 16 bits were consumed since the refill. */
static inline int magnitude(vit_bits *b, int size) {
    int value = extend((uint32_t)(b->bits >> (64 - size)), size);
    CONSUME(*b, size);
    return value;
}

static inline int decode_dc(vit_bits *b, const vit_huffman *dc, int *dc_value) {
    REFILL(*b);
    uint32_t entry = dc->fast[LOOK(*b)];
    int difference = 0;
    if (entry & COEFFICIENT) {
        CONSUME(*b, entry);
        difference = (int32_t)entry >> 16;
    } else {
        int size = slow_symbol(b, dc);
        if (size < 0) return -1;
        if (size) difference = magnitude(b, size);
    }
    *dc_value += difference;
    return *dc_value < -32768 || *dc_value > 32767 ? -1 : 0;
}

static inline __attribute__((always_inline)) int decode_block(vit_bits *bits, const vit_huffman *dc,
                                                              const vit_huffman *ac, const uint16_t *quant,
                                                              int *dc_value, int16_t *pair, int half) {
    vit_bits b = *bits;
    int16_t *block = pair + half;
    if (decode_dc(&b, dc, dc_value)) return -1;
    block[0] = (int16_t)(*dc_value * quant[0]);
    int k = 1;
    for (;;) {
        uint32_t entry = 0;
        REFILL(b);
        for (int i = 0; i < 56 / FAST_BITS; i++) {
            entry = ac->fast[LOOK(b)];
            if (!(entry & COEFFICIENT)) goto other;
            CONSUME(b, entry);
            k += (int)(entry >> 8 & 15);
            block[position[k]] = (int16_t)(((int32_t)entry >> 16) * quant[k]);
            if (++k >= 64) goto done;
        }
        continue;
    other:
        if (entry & END) {
            CONSUME(b, entry);
            break;
        }
        REFILL(b);
        int symbol = (int)(entry >> 8 & 255);
        if (entry) {
            CONSUME(b, entry);
        } else if ((symbol = slow_symbol(&b, ac)) < 0) {
            return -1;
        }
        int run = symbol >> 4, size = symbol & 15;
        if (size) {
            k += run;
            block[position[k]] = (int16_t)(magnitude(&b, size) * quant[k]);
            k++;
        } else if (run == 15) {
            k += 16;
        } else if (run == 0) {
            break;
        } else {
            return -1;
        }
        if (k >= 64) break;
    }
done:
    *bits = b;
    return k > 64 ? -1 : k - 1;
}

static inline __attribute__((always_inline)) int skip_block(vit_bits *bits, const vit_huffman *dc,
                                                            const vit_huffman *ac, int *dc_value) {
    vit_bits b = *bits;
    if (decode_dc(&b, dc, dc_value)) return -1;
    int k = 1;
    while (k < 64) {
        REFILL(b);
        uint32_t several = ac->skip[LOOK(b)];
        int places = (int)(several >> 8);
        if (several && k + places < 64) {
            CONSUME(b, several);
            k += places;
            if (several & SKIP_END) break;
            several = ac->skip[LOOK(b)]; /* One look-up uses at most FAST_BITS + 15 bits: no refill between two. */
            places = (int)(several >> 8);
            if (several && k + places < 64) {
                CONSUME(b, several);
                k += places;
                if (several & SKIP_END) break;
                continue;
            }
            REFILL(b);
        }
        /* One symbol: the block may end with this one, and the next would be another block's. */
        int symbol = slow_symbol(&b, ac);
        if (symbol < 0) return -1;
        int run = symbol >> 4, size = symbol & 15;
        if (symbol == 0) break;
        if (!size && run != 15) return -1;
        k += run + 1;
        CONSUME(b, size);
    }
    *bits = b;
    return k > 64 ? -1 : 0;
}

int vit_decode_block_scalar(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, const uint16_t *quant,
                            int *dc_value, int16_t *pair, int half) {
    return decode_block(bits, dc, ac, quant, dc_value, pair, half);
}

int vit_skip_block_scalar(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, int *dc_value) {
    return skip_block(bits, dc, ac, dc_value);
}

#ifdef VIT_X86

/* The same code with the shifts of BMI2, which leave the flags alone. */

VIT_AVX2 int vit_decode_block_avx2(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, const uint16_t *quant,
                                   int *dc_value, int16_t *pair, int half) {
    return decode_block(bits, dc, ac, quant, dc_value, pair, half);
}

VIT_AVX2 int vit_skip_block_avx2(vit_bits *bits, const vit_huffman *dc, const vit_huffman *ac, int *dc_value) {
    return skip_block(bits, dc, ac, dc_value);
}

#endif
