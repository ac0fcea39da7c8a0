/* float16 to float32 and back, by the processor's own instructions: what numpy does one element after the other. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define F16C __attribute__((target("avx,f16c")))

static int can_convert(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
}

F16C static void widen_all(char *out, const char *from, Py_ssize_t count) {
    Py_ssize_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps((float *)(out + 4 * i), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
    if (i < count) {
        uint16_t rest[8] = {0};
        float wide[8];
        memcpy(rest, from + 2 * i, (size_t)(2 * (count - i)));
        _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)rest)));
        memcpy(out + 4 * i, wide, (size_t)(4 * (count - i)));
    }
}

F16C static void narrow_all(char *out, const char *from, Py_ssize_t count) {
    Py_ssize_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps((const float *)(from + 4 * i)), _MM_FROUND_TO_NEAREST_INT));
    if (i < count) {
        float rest[8] = {0};
        uint16_t stored[8];
        memcpy(rest, from + 4 * i, (size_t)(4 * (count - i)));
        _mm_storeu_si128((__m128i *)stored, _mm256_cvtps_ph(_mm256_loadu_ps(rest), _MM_FROUND_TO_NEAREST_INT));
        memcpy(out + 2 * i, stored, (size_t)(2 * (count - i)));
    }
}
#else
static int can_convert(void) { return 0; }
static void widen_all(char *out, const char *from, Py_ssize_t count) { (void)out, (void)from, (void)count; }
static void narrow_all(char *out, const char *from, Py_ssize_t count) { (void)out, (void)from, (void)count; }
#endif

typedef void (*Conversion)(char *, const char *, Py_ssize_t);

/* `out` has elements of `to` bytes, what is converted those of `from` bytes, as many of them. */
static PyObject *convert(PyObject *args, Conversion conversion, Py_ssize_t to, Py_ssize_t from) {
    Py_buffer out, source;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "w*y*", &out, &source))
        return NULL;
    if (source.len % from || out.len / to != source.len / from || out.len % to) {
        PyErr_SetString(PyExc_ValueError, "the output is not of as many elements as the input");
    } else {
        Py_BEGIN_ALLOW_THREADS
        conversion(out.buf, source.buf, source.len / from);
        Py_END_ALLOW_THREADS
        answer = Py_None;
        Py_INCREF(answer);
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&out);
    return answer;
}

static PyObject *widen(PyObject *self, PyObject *args) {
    (void)self;
    return convert(args, widen_all, 4, 2);
}

static PyObject *narrow(PyObject *self, PyObject *args) {
    (void)self;
    return convert(args, narrow_all, 2, 4);
}

static PyMethodDef methods[] = {
    {"widen", widen, METH_VARARGS, "widen(out, halves, /)\n--\n\nfloat16 bytes as float32 bytes, exactly."},
    {"narrow", narrow, METH_VARARGS, "narrow(out, floats, /)\n--\n\nfloat32 bytes as float16 bytes, to nearest even."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_halves", "Conversions of float16.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__halves(void) {
    if (!can_convert()) {
        PyErr_SetString(PyExc_ImportError, "this processor has no instructions for float16");
        return NULL;
    }
    return PyModule_Create(&module);
}
