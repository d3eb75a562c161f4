/* The Python door of tile.c. The interpreter lock is released for each file. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>

#include "tile.h"

PyDoc_STRVAR(tile_doc, "tile(data, tile_pixels, max_pixels)\n\n"
                       "The same JPEG as a baseline file with a restart marker about every tile_pixels pixels of a row "
                       "of blocks. Raises ValueError if the file is damaged, too large or not of one or three "
                       "components.");

static PyObject *tile_jpeg(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer data;
    int tile_pixels, failed;
    vit_tiled made;
    long max_pixels;
    if (!PyArg_ParseTuple(args, "y*il", &data, &tile_pixels, &max_pixels)) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    failed = vit_tile(data.buf, (size_t)data.len, tile_pixels, max_pixels, &made);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&data);
    if (failed) {
        PyErr_SetString(PyExc_ValueError, made.message);
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize((const char *)made.data, (Py_ssize_t)made.size);
    free(made.data);
    return result;
}

static PyMethodDef methods[] = {
    {"tile", tile_jpeg, METH_VARARGS, tile_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_tiled",
    .m_doc = "Lossless re-marking of JPEG files, by libjpeg.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__tiled(void) { return PyModuleDef_Init(&definition); }
