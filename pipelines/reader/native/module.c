/* The Python door. The interpreter lock is released for a whole batch of images. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "native.h"

/* Buffers of a sequence of bytes-like objects. */
typedef struct {
    Py_buffer *views;
    Py_ssize_t count;
} images;

static void release(images *batch) {
    for (Py_ssize_t i = 0; i < batch->count; i++) PyBuffer_Release(&batch->views[i]);
    PyMem_Free(batch->views);
}

static int acquire(PyObject *sequence, images *batch) {
    batch->count = 0;
    batch->views = NULL;
    PyObject *fast = PySequence_Fast(sequence, "images is not a sequence");
    if (!fast) return -1;
    Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    batch->views = PyMem_Calloc((size_t)(n ? n : 1), sizeof *batch->views);
    if (!batch->views) PyErr_NoMemory();
    while (batch->views && batch->count < n) {
        PyObject *item = PySequence_Fast_GET_ITEM(fast, batch->count);
        if (PyObject_GetBuffer(item, &batch->views[batch->count], PyBUF_SIMPLE)) break;
        batch->count++;
    }
    Py_DECREF(fast);
    if (batch->views && batch->count == n) return 0;
    release(batch);
    return -1;
}

/* The argument's size must be exactly so many bytes. */
static int has_size(const Py_buffer *view, const char *name, Py_ssize_t size) {
    if (view->len == size) return 1;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %zd are needed", name, view->len, size);
    return 0;
}

PyDoc_STRVAR(read_sizes_doc, "read_sizes(images, sizes)\n\n"
                             "Width and height of each image into sizes, int32 (n, 2); 0 0 where decode() would not "
                             "take it.");

static PyObject *read_sizes(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *sequence;
    Py_buffer sizes;
    images batch;
    if (!PyArg_ParseTuple(args, "Ow*", &sequence, &sizes)) return NULL;
    if (acquire(sequence, &batch)) {
        PyBuffer_Release(&sizes);
        return NULL;
    }
    int good = has_size(&sizes, "sizes", batch.count * 2 * (Py_ssize_t)sizeof(int32_t));
    if (good) {
        Py_BEGIN_ALLOW_THREADS;
        int32_t *out = sizes.buf;
        for (Py_ssize_t i = 0; i < batch.count; i++, out += 2) {
            vit_header header;
            int status = vit_read_header(batch.views[i].buf, (size_t)batch.views[i].len, &header);
            out[0] = status == VIT_OK ? header.width : 0;
            out[1] = status == VIT_OK ? header.height : 0;
        }
        Py_END_ALLOW_THREADS;
    }
    release(&batch);
    PyBuffer_Release(&sizes);
    if (!good) return NULL;
    Py_RETURN_NONE;
}

typedef struct {
    Py_buffer crops, places, out, status; /* int32 (n, 6), int64 (n,), uint8 (N, 3, H, W), uint8 (n,) */
    int height, width, cubic, simd;
} job;

static int check(const job *j, Py_ssize_t n, Py_ssize_t image_bytes) {
    if (!has_size(&j->crops, "crops", n * 6 * (Py_ssize_t)sizeof(int32_t))) return 0;
    if (!has_size(&j->places, "places", n * (Py_ssize_t)sizeof(int64_t))) return 0;
    if (!has_size(&j->status, "status", n)) return 0;
    if (j->out.len % image_bytes) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, which are no whole images of %zd", j->out.len, image_bytes);
        return 0;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        int64_t place = ((const int64_t *)j->places.buf)[i];
        int32_t scale = ((const int32_t *)j->crops.buf)[6 * i];
        if (place < 0 || place >= j->out.len / image_bytes) {
            PyErr_Format(PyExc_IndexError, "places[%zd]=%lld is outside out", i, (long long)place);
            return 0;
        }
        if (scale != 1 && scale != 2 && scale != 4 && scale != 8) {
            PyErr_Format(PyExc_ValueError, "crops[%zd]: scale %d is not 1, 2, 4 or 8", i, (int)scale);
            return 0;
        }
    }
    return 1;
}

/* Runs without the interpreter lock. 0, or -1 for no memory. */
static int decode_all(const images *batch, const job *j, size_t image_bytes) {
    vit_decoder *decoder = vit_new_decoder(j->simd);
    if (!decoder) return -1;
    for (Py_ssize_t i = 0; i < batch->count; i++) {
        const int32_t *c = (const int32_t *)j->crops.buf + 6 * i;
        vit_crop crop = {c[0], c[1], c[2], c[3], c[4], c[5]};
        uint8_t *out = (uint8_t *)j->out.buf + (size_t)((const int64_t *)j->places.buf)[i] * image_bytes;
        ((uint8_t *)j->status.buf)[i] = (uint8_t)vit_decode(decoder, batch->views[i].buf, (size_t)batch->views[i].len,
                                                            &crop, j->height, j->width, j->cubic, out);
    }
    vit_free_decoder(decoder);
    return 0;
}

PyDoc_STRVAR(decode_doc, "decode(images, crops, places, out, status, height, width, cubic, simd)\n\n"
                         "Crop i (int32: scale, x, y, width, height, flip, in pixels of the image at 1 / scale) of image "
                         "i into out[places[i]], uint8 (3, height, width). status[i] is 0, or says why not: "
                         "1 not a plain JPEG, 2 damaged, 3 no memory, 4 the crop leaves the image.");

static PyObject *decode(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *sequence;
    images batch;
    job j;
    if (!PyArg_ParseTuple(args, "Oy*y*w*w*iipp", &sequence, &j.crops, &j.places, &j.out, &j.status, &j.height, &j.width,
                          &j.cubic, &j.simd))
        return NULL;
    Py_buffer *views[4] = {&j.crops, &j.places, &j.out, &j.status};
    int good = 0;
    if (j.height < 1 || j.width < 1 || j.height > 16384 || j.width > 16384) {
        PyErr_Format(PyExc_ValueError, "%d x %d is no size from 1 to 16384", j.height, j.width);
    } else if (!acquire(sequence, &batch)) {
        Py_ssize_t image_bytes = (Py_ssize_t)3 * j.height * j.width;
        good = check(&j, batch.count, image_bytes);
        if (good) {
            int failed;
            Py_BEGIN_ALLOW_THREADS;
            failed = decode_all(&batch, &j, (size_t)image_bytes);
            Py_END_ALLOW_THREADS;
            if (failed) {
                PyErr_NoMemory();
                good = 0;
            }
        }
        release(&batch);
    }
    for (int i = 0; i < 4; i++) PyBuffer_Release(views[i]);
    if (!good) return NULL;
    Py_RETURN_NONE;
}

static PyObject *has_simd(PyObject *self, PyObject *args) {
    (void)self;
    (void)args;
    return PyBool_FromLong(vit_has_simd());
}

static PyMethodDef methods[] = {
    {"read_sizes", read_sizes, METH_VARARGS, read_sizes_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {"has_simd", has_simd, METH_NOARGS, "has_simd()\n\nWhether decode(simd=True) runs vector code here."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_jpeg",
    .m_doc = "Plain JPEG files to cropped, resized and mirrored pixels.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModuleDef_Init(&definition); }
