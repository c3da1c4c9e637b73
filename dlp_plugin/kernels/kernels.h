/* The data that the kernels work on, and the functions that each processor's file provides.

   A row of a weight consists of its mask, 64 columns per word, and of the values that the mask
   marks, one after the other. A row of integers is first unpacked to such values, in a buffer that
   stays in the cache. So all kinds are multiplied by the same loops. Loads may read up to one
   vector past the end of the values: tensors and buffers are padded for that. */
#ifndef DLP_KERNELS_H
#define DLP_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are read as little-endian words"
#endif

/* Compilers keep sums in registers only if the loops over them are unrolled. */
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

/* Software prefetch runs this many bytes ahead of the reads. The hardware prefetchers stop at the
   end of a 4 kB page, and cannot predict steps that depend on the mask. Without software prefetch
   a core mostly waits for memory. */
#define AHEAD 2048

#define SPARE 64 /* padding of buffers, in entries, because vectors may reach past the end */
#define FEW 4  /* largest number of rows of x for which values are expanded in registers */
#define SOME 6 /* the same for products of bfloat16 with bfloat16 */

enum { BF16, FP16, FP32 }; /* dtypes */

typedef struct {
    int64_t rows, columns;
    int64_t words;          /* per row of the mask, 64 columns each */
    const uint64_t *mask;   /* [rows][words]; NULL if all columns are stored */
    const int64_t *starts;  /* [rows + 1], index of each row's first value; NULL if mask is */
    const uint8_t *packed;  /* values or integers */
    const void *scale;      /* of integers: [rows][groups] */
    const uint8_t *zero;    /* of integers: [rows][groups]; NULL for 2 ** (bits - 1) */
    int64_t groups;
    int32_t bits;           /* of integers: 4 or 8; 0 for values */
    int32_t dtype;          /* of the values or scales */
} Weight;

/* The functions of one processor. Expanded rows and x are float32 with 64 * words columns. They are
   zero where nothing is stored, and past the last column. Each processor has its own order of
   columns in them. */
typedef struct {
    void (*widen)(int dtype, const void *in, int64_t count, float *out);
    void (*narrow)(int dtype, const float *in, int64_t count, void *out);
    /* Reorders x from the normal order of columns to the order of expanded rows. */
    void (*order)(int dtype, float *x, int64_t words);
    /* Writes a row's values (integer - zero) * scale, rounded to the dtype. */
    void (*unpack)(const Weight *weight, int64_t row, const float *scales, void *out);
    /* Writes the products of four rows with count <= FEW rows of x to out[4 * row of x + row].
       The rows of x are interleaved: each word's 64 columns of all rows, then the next word's. If
       the masks are NULL, all columns are stored. */
    void (*dots)(int dtype, const uint64_t *const mask[4], const void *const values[4],
                 int64_t words, const float *x, int64_t count, float *out);
    void (*expand)(int dtype, const uint64_t *mask, const void *values, int64_t words, float *out);
    /* Writes the products of four expanded rows with count rows of x to out[4 * row of x + row]. */
    void (*tile)(const float *rows, const float *x, int64_t count, int64_t words, float *out);
    /* Writes a row with its zeros, in the dtype of its values and the normal order of columns. */
    void (*dense)(int dtype, const uint64_t *mask, const void *values, int64_t words, void *out);
    /* Like dots, for two bfloat16 rows with one bfloat16 row of x, both in the normal order of
       columns. This function and the next two are NULL if the processor has no such products. */
    void (*pair_dot)(const uint64_t *const mask[2], const void *const values[2], int64_t words,
                     const uint16_t *x, float *out);
    /* Like pair_dot, for four rows with count <= SOME rows of x. */
    void (*pair_dots)(const uint64_t *const mask[4], const void *const values[4], int64_t words,
                      const uint16_t *x, int64_t count, float *out);
    /* Like tile, for bfloat16 rows and x in the normal order of columns. */
    void (*pair_tile)(const uint16_t *rows, const uint16_t *x, int64_t count, int64_t words,
                      float *out);
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
#endif

/* Calls a function with constants as first arguments, so that it is compiled for each of them. */
#define FOR_EACH(function, dtype, masked, ...)                           \
    switch (2 * (dtype) + !!(masked)) {                                  \
    case 2 * BF16: return function(BF16, 0, __VA_ARGS__);                \
    case 2 * BF16 + 1: return function(BF16, 1, __VA_ARGS__);            \
    case 2 * FP16: return function(FP16, 0, __VA_ARGS__);                \
    case 2 * FP16 + 1: return function(FP16, 1, __VA_ARGS__);            \
    case 2 * FP32: return function(FP32, 0, __VA_ARGS__);                \
    default: return function(FP32, 1, __VA_ARGS__);                      \
    }

#define FOR_FEW(function, count, ...)               \
    switch (count) {                                \
    case 1: return function(1, __VA_ARGS__);        \
    case 2: return function(2, __VA_ARGS__);        \
    case 3: return function(3, __VA_ARGS__);        \
    default: return function(4, __VA_ARGS__);       \
    }

INLINE const uint64_t *
mask_of(const Weight *weight, int64_t row)
{
    return weight->mask ? weight->mask + row * weight->words : NULL;
}

/* The index of a row's first value among all stored values. */
INLINE int64_t
start_of(const Weight *weight, int64_t row)
{
    return weight->mask ? weight->starts[row] : row * weight->columns;
}

/* The number of stored columns from first to last, last not included. */
INLINE int64_t
ones(const uint64_t *mask, int64_t first, int64_t last)
{
    int64_t count = 0;
    if ((first | last) % 64 == 0) {
        for (int64_t word = first / 64; word < last / 64; word++)
            count += __builtin_popcountll(mask[word]);
        return count;
    }
    for (int64_t word = first / 64; 64 * word < last; word++) {
        uint64_t bits = mask[word];
        if (64 * word < first)
            bits &= ~(uint64_t)0 << (first - 64 * word);
        if (64 * (word + 1) > last)
            bits &= ~(uint64_t)0 >> (64 * (word + 1) - last);
        count += __builtin_popcountll(bits);
    }
    return count;
}

/* The order function of processors whose expanded rows have the normal order of columns. */
INLINE void as_it_is(int dtype, float *x, int64_t words) { (void)dtype, (void)x, (void)words; }

INLINE int size_of(int dtype) { return dtype == FP32 ? 4 : 2; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
