/* JPEG files with restart markers every few MCUs: the same coefficients, so the same pixels, but entropy-coded in
 * pieces of which a reader may pass over those outside its crop.
 *
 * libjpeg reads and writes the coefficients; the result is read back and compared one by one. All markers are kept.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "tile.h"

#define MAX_SCANS 100 /* a progressive file of many thousand scans costs minutes */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
} errors;

static void stop(j_common_ptr info) {
    errors *e = (errors *)info->err;
    e->base.format_message(info, e->message);
    longjmp(e->jump, 1);
}

/* Warnings speak of damage; a damaged file is not touched. */
static void stop_at_warning(j_common_ptr info, int level) {
    if (level < 0) stop(info);
}

static void check_scans(j_common_ptr info) {
    j_decompress_ptr in = (j_decompress_ptr)info;
    if (info->is_decompressor && in->input_scan_number > MAX_SCANS) {
        snprintf(((errors *)info->err)->message, JMSG_LENGTH_MAX, "more than %d scans", MAX_SCANS);
        longjmp(((errors *)info->err)->jump, 1);
    }
}

/* libjpeg's own growing buffer is lost when an error jumps out in the middle. */
typedef struct {
    struct jpeg_destination_mgr base;
    unsigned char *data;
    size_t capacity, size;
} output;

static void open_output(j_compress_ptr out) {
    output *o = (output *)out->dest;
    o->base.next_output_byte = o->data;
    o->base.free_in_buffer = o->capacity;
}

static boolean grow_output(j_compress_ptr out) {
    output *o = (output *)out->dest;
    unsigned char *larger = realloc(o->data, o->capacity * 2);
    if (!larger) {
        snprintf(((errors *)out->err)->message, JMSG_LENGTH_MAX, "no memory");
        longjmp(((errors *)out->err)->jump, 1);
    }
    o->data = larger;
    o->base.next_output_byte = larger + o->capacity;
    o->base.free_in_buffer = o->capacity;
    o->capacity *= 2;
    return TRUE;
}

static void close_output(j_compress_ptr out) {
    output *o = (output *)out->dest;
    o->size = o->capacity - o->base.free_in_buffer;
}

/* Both files stay open while their coefficients are compared. Everything that libjpeg's jumps may skip is in here. */
typedef struct {
    struct jpeg_decompress_struct in, check;
    struct jpeg_compress_struct out;
    struct jpeg_progress_mgr progress;
    errors error;
    output result;
    int has_in, has_out, has_check;
} work;

static jvirt_barray_ptr *read_coefficients(work *w, j_decompress_ptr in, const unsigned char *data, unsigned long size) {
    in->progress = &w->progress;
    jpeg_mem_src(in, data, size);
    for (int marker = 0; marker < 16; marker++) jpeg_save_markers(in, JPEG_APP0 + marker, 0xffff);
    jpeg_save_markers(in, JPEG_COM, 0xffff);
    jpeg_read_header(in, TRUE);
    return jpeg_read_coefficients(in);
}

static int is_like(const jpeg_component_info *a, const jpeg_component_info *b) {
    return a->component_id == b->component_id && a->h_samp_factor == b->h_samp_factor &&
           a->v_samp_factor == b->v_samp_factor && a->width_in_blocks == b->width_in_blocks &&
           a->height_in_blocks == b->height_in_blocks && a->quant_table && b->quant_table &&
           !memcmp(a->quant_table->quantval, b->quant_table->quantval, sizeof a->quant_table->quantval);
}

static int is_same(work *w, jvirt_barray_ptr *before, jvirt_barray_ptr *after) {
    j_decompress_ptr in = &w->in, check = &w->check;
    if (in->image_width != check->image_width || in->image_height != check->image_height) return 0;
    if (in->num_components != check->num_components || in->jpeg_color_space != check->jpeg_color_space) return 0;
    for (int c = 0; c < in->num_components; c++) {
        jpeg_component_info *a = &in->comp_info[c], *b = &check->comp_info[c];
        if (!is_like(a, b)) return 0;
        for (JDIMENSION row = 0; row < a->height_in_blocks; row++) {
            JBLOCKARRAY p = in->mem->access_virt_barray((j_common_ptr)in, before[c], row, 1, FALSE);
            JBLOCKARRAY q = check->mem->access_virt_barray((j_common_ptr)check, after[c], row, 1, FALSE);
            if (memcmp(p[0], q[0], a->width_in_blocks * sizeof(JBLOCK))) return 0;
        }
    }
    return 1;
}

static int is_marker(jpeg_saved_marker_ptr marker, int code, const char *name) {
    size_t size = strlen(name);
    return marker->marker == code && marker->data_length >= size && !memcmp(marker->data, name, size);
}

static void copy_markers(work *w) {
    for (jpeg_saved_marker_ptr m = w->in.marker_list; m; m = m->next) {
        /* libjpeg writes these itself. */
        if (w->out.write_JFIF_header && is_marker(m, JPEG_APP0, "JFIF")) continue;
        if (w->out.write_Adobe_marker && is_marker(m, JPEG_APP0 + 14, "Adobe")) continue;
        jpeg_write_marker(&w->out, m->marker, m->data, m->data_length);
    }
}

/* 0: w->result holds the tiled file. 1: w->error.message says why not. */
static int tile(work *w, const unsigned char *data, unsigned long size, int tile_pixels, long max_pixels) {
    w->in.err = w->out.err = w->check.err = jpeg_std_error(&w->error.base);
    w->error.base.error_exit = stop;
    w->error.base.emit_message = stop_at_warning;
    w->progress.progress_monitor = check_scans;
    w->result.base.init_destination = open_output;
    w->result.base.empty_output_buffer = grow_output;
    w->result.base.term_destination = close_output;
    w->result.capacity = size + 4096;
    w->result.data = malloc(w->result.capacity);
    if (!w->result.data) {
        snprintf(w->error.message, JMSG_LENGTH_MAX, "no memory");
        return 1;
    }
    if (setjmp(w->error.jump)) return 1;
    jpeg_create_decompress(&w->in);
    w->has_in = 1;
    jpeg_mem_src(&w->in, data, size);
    jpeg_read_header(&w->in, TRUE);
    if ((double)w->in.image_width * w->in.image_height > (double)max_pixels) {
        snprintf(w->error.message, JMSG_LENGTH_MAX, "%u x %u pixels", w->in.image_width, w->in.image_height);
        return 1;
    }
    if (w->in.num_components != 1 && w->in.num_components != 3) {
        snprintf(w->error.message, JMSG_LENGTH_MAX, "%d colour components", w->in.num_components);
        return 1;
    }
    jpeg_abort_decompress(&w->in);
    jvirt_barray_ptr *before = read_coefficients(w, &w->in, data, size);
    jpeg_create_compress(&w->out);
    w->has_out = 1;
    w->out.dest = &w->result.base;
    jpeg_copy_critical_parameters(&w->in, &w->out);
    w->out.optimize_coding = TRUE;
    /* One component is coded block by block, whatever its sampling. */
    int mcu = w->in.num_components == 1 ? 8 : 8 * w->in.max_h_samp_factor;
    w->out.restart_interval = (unsigned)(tile_pixels / mcu > 0 ? tile_pixels / mcu : 1);
    jpeg_write_coefficients(&w->out, before);
    copy_markers(w);
    jpeg_finish_compress(&w->out);

    jpeg_create_decompress(&w->check);
    w->has_check = 1;
    jvirt_barray_ptr *after = read_coefficients(w, &w->check, w->result.data, w->result.size);
    if (!is_same(w, before, after)) {
        snprintf(w->error.message, JMSG_LENGTH_MAX, "the coefficients written are not those read");
        return 1;
    }
    /* Whatever is wrong behind the last scan shows here. */
    jpeg_finish_decompress(&w->check);
    jpeg_finish_decompress(&w->in);
    return 0;
}

int vit_tile(const unsigned char *data, size_t size, int tile_pixels, long max_pixels, vit_tiled *result) {
    memset(result, 0, sizeof *result);
    work *w = calloc(1, sizeof *w);
    if (!w) {
        snprintf(result->message, sizeof result->message, "no memory");
        return 1;
    }
    int failed = tile(w, data, (unsigned long)size, tile_pixels, max_pixels);
    if (w->has_out) jpeg_destroy_compress(&w->out);
    if (w->has_in) jpeg_destroy_decompress(&w->in);
    if (w->has_check) jpeg_destroy_decompress(&w->check);
    if (failed) {
        snprintf(result->message, sizeof result->message, "%s", w->error.message);
        free(w->result.data);
    } else {
        result->data = w->result.data;
        result->size = w->result.size;
    }
    free(w);
    return failed;
}
