/* Weighted sums of bfloat16 tensors in one pass, in the arithmetic of packed.py and therefore with its bits: each
 * product and each sum is a float32 operation rounded once, the result is rounded to nearest, ties to even.
 *
 * Built without contraction: a fused multiply-add would keep digits that numpy rounds away. Inputs may lie in mapped
 * files. One that was cut, or whose disk fails, is an OSError here, where the signal would end the process. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#define WORDS 1024 /* words that are carried through all inputs before the next: their sums stay in the first cache */
#define UPPER 0xFFFF0000u

/* The widest registers that the processor has are found when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif

/* A word holds two elements: shifted left it is the first as float32, masked the second. */
typedef struct {
    float first, second;
} Pair;

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits + 0x7FFF + (bits >> 16 & 1);
}

static inline Pair scaled(const char *from, float share) {
    uint32_t word;
    memcpy(&word, from, 4);
    return (Pair){as_float(word << 16) * share, as_float(word & UPPER) * share};
}

/* Stores two results; the answer has a bit 15 or 31 where one is not finite. */
static inline uint32_t stored(char *out, float first, float second) {
    uint32_t word = rounded(first) >> 16 | (rounded(second) & UPPER);
    memcpy(out, &word, 4);
    return (word & 0x7F807F80) + 0x00800080;
}

/* `words` whole words; whether all results are finite. */
EVERY_WIDTH
static int sum_up(char *out, const float *weights, const char *const *inputs, int many, Py_ssize_t words) {
    uint32_t endless = 0;
    if (many == 2) {
        const char *a = inputs[0], *b = inputs[1];
        float of_a = weights[0], of_b = weights[1];
        for (Py_ssize_t i = 0; i < words; i++) {
            Pair x = scaled(a + 4 * i, of_a), y = scaled(b + 4 * i, of_b);
            endless |= stored(out + 4 * i, x.first + y.first, x.second + y.second);
        }
        return !(endless & 0x80008000);
    }
    float firsts[WORDS], seconds[WORDS];
    for (Py_ssize_t start = 0; start < words; start += WORDS) {
        Py_ssize_t n = words - start < WORDS ? words - start : WORDS;
        for (int k = 0; k < many; k++) {
            const char *one = inputs[k] + 4 * start;
            float share = weights[k];
            for (Py_ssize_t i = 0; i < n; i++) {
                Pair x = scaled(one + 4 * i, share);
                firsts[i] = k ? firsts[i] + x.first : x.first;
                seconds[i] = k ? seconds[i] + x.second : x.second;
            }
        }
        for (Py_ssize_t i = 0; i < n; i++)
            endless |= stored(out + 4 * (start + i), firsts[i], seconds[i]);
    }
    return !(endless & 0x80008000);
}

/* One element that has no neighbour. */
static int sum_up_one(char *out, const float *weights, const char *const *inputs, int many, Py_ssize_t at) {
    float sum = 0.0f;
    for (int k = 0; k < many; k++) {
        uint16_t upper;
        memcpy(&upper, inputs[k] + at, 2);
        float product = as_float((uint32_t)upper << 16) * weights[k];
        sum = k ? sum + product : product;
    }
    uint16_t result = (uint16_t)(rounded(sum) >> 16);
    memcpy(out + at, &result, 2);
    return (result & 0x7F80) != 0x7F80;
}

static _Thread_local sigjmp_buf *way_out;
static struct sigaction before;
static volatile sig_atomic_t handed_over;

static void on_bus_error(int number, siginfo_t *info, void *context) {
    (void)info, (void)context;
    if (way_out)
        siglongjmp(*way_out, 1);
    /* Not ours: the instruction runs again, and meets who stood here before. Whoever took the signal after us and was
     * found here by the next sum may hand it back: then nobody is left. */
    if (handed_over)
        signal(number, SIG_DFL);
    else
        sigaction(number, &before, NULL);
    handed_over = 1;
}

/* Another library may have taken the signal since the last call. */
static void watch_bus_errors(void) {
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) == 0 && now.sa_sigaction != on_bus_error) {
        struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
        before = now;
        handed_over = 0;
        sigaction(SIGBUS, &ours, NULL);
    }
}

/* Of `count` bytes. 1: finite, 0: not, -1: some input could not be read. */
static int guarded_sum(char *out, const float *weights, const char *const *inputs, int many, Py_ssize_t count) {
    sigjmp_buf here;
    if (sigsetjmp(here, 1)) {
        way_out = NULL;
        return -1;
    }
    way_out = &here;
    int finite = sum_up(out, weights, inputs, many, count / 4);
    if (count % 4)
        finite &= sum_up_one(out, weights, inputs, many, count - 2);
    way_out = NULL;
    return finite;
}

PyDoc_STRVAR(weighted_sum_doc,
             "weighted_sum(out, weights, inputs, /)\n--\n\n"
             "sum_i weights[i] * inputs[i] of bfloat16 bytes, rounded to nearest even into `out`.\n\n"
             "False where a result is not finite. Raises OSError where an input is mapped and cannot be read.");

/* What one call holds on to. */
typedef struct {
    Py_buffer out, *views;
    const char **inputs;
    float *weights;
    int many, held;
} Call;

static int take(Call *call, PyObject *shares, PyObject *sources) {
    Py_ssize_t many = PySequence_Size(sources), given = PySequence_Size(shares);
    if (PyErr_Occurred())
        return 0;
    if (many < 1 || many > INT_MAX || given != many || call->out.len % 2) {
        PyErr_SetString(PyExc_ValueError, "one weight an input, and an even number of bytes, the same for all");
        return 0;
    }
    call->views = PyMem_Calloc((size_t)many, sizeof *call->views);
    call->inputs = PyMem_Calloc((size_t)many, sizeof *call->inputs);
    call->weights = PyMem_Calloc((size_t)many, sizeof *call->weights);
    if (!call->views || !call->inputs || !call->weights) {
        PyErr_NoMemory();
        return 0;
    }
    call->many = (int)many;
    for (int k = 0; k < call->many; k++) {
        PyObject *share = PySequence_GetItem(shares, k), *source = PySequence_GetItem(sources, k);
        double weight = share ? PyFloat_AsDouble(share) : -1.0;
        int taken = source && !PyErr_Occurred() && PyObject_GetBuffer(source, &call->views[k], PyBUF_SIMPLE) == 0;
        Py_XDECREF(share);
        Py_XDECREF(source);
        if (!taken)
            return 0;
        call->held++;
        call->weights[k] = (float)weight;
        call->inputs[k] = call->views[k].buf;
        if (call->views[k].len != call->out.len) {
            PyErr_SetString(PyExc_ValueError, "one weight an input, and an even number of bytes, the same for all");
            return 0;
        }
    }
    return 1;
}

static void give_back(Call *call) {
    while (call->held)
        PyBuffer_Release(&call->views[--call->held]);
    PyMem_Free(call->views);
    PyMem_Free(call->inputs);
    PyMem_Free(call->weights);
    PyBuffer_Release(&call->out);
}

static PyObject *weighted_sum(PyObject *self, PyObject *args) {
    (void)self;
    Call call = {0};
    PyObject *shares, *sources, *answer = NULL;
    if (!PyArg_ParseTuple(args, "w*OO", &call.out, &shares, &sources))
        return NULL;
    if (take(&call, shares, sources)) {
        int finite;
        watch_bus_errors();
        Py_BEGIN_ALLOW_THREADS
        finite = guarded_sum(call.out.buf, call.weights, call.inputs, call.many, call.out.len);
        Py_END_ALLOW_THREADS
        if (finite >= 0) {
            answer = PyBool_FromLong(finite);
        } else {
            errno = EIO;
            PyErr_SetFromErrno(PyExc_OSError);
        }
    }
    give_back(&call);
    return answer;
}

static PyMethodDef methods[] = {{"weighted_sum", weighted_sum, METH_VARARGS, weighted_sum_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sums", "Weighted sums of bfloat16 tensors.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__sums(void) { return PyModule_Create(&module); }
