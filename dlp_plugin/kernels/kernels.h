/* What the kernels work on, and what each processor's file provides.

   A row of a weight is its mask, 64 columns a word, and the values that the mask marks, one after
   another. A row of integers is first unpacked to such values, in a buffer that stays in the
   cache; so every kind is multiplied by the same loops. Values may be read up to one vector past
   their end: the tensors are padded, and so are the buffers. */
#ifndef DLP_KERNELS_H
#define DLP_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are read as little-endian words"
#endif

/* Sums stay in registers only where the loops over them are unrolled. */
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

/* Software prefetch runs this many bytes ahead of what is read. The processor's own prefetchers
   end at a page of 4 kB and see no pattern in steps that depend on the mask: without it a core
   waits for memory most of its time. */
#define AHEAD 2048

#define SPARE 64 /* entries past the end of a buffer that vectors may touch */
#define FEW 4  /* rows of x for which values are expanded in registers */
#define SOME 6 /* the same where bfloat16 is multiplied by bfloat16 */

enum { BF16, FP16, FP32 }; /* dtypes */

typedef struct {
    int64_t rows, columns;
    int64_t words;          /* of 64 columns, a row */
    const uint64_t *mask;   /* [rows][words], or NULL where all are stored */
    const int64_t *starts;  /* [rows + 1], of each row's first value; NULL with mask */
    const uint8_t *packed;  /* values, or integers */
    const void *scale;      /* of integers, [rows][groups] */
    const uint8_t *zero;    /* of integers, [rows][groups], or NULL: in the middle */
    int64_t groups;
    int32_t bits;           /* of integers, 4 or 8; 0 for values */
    int32_t dtype;          /* of the values, or of the scales */
} Weight;

/* One processor's functions. Expanded rows and x are float32 of 64 * words columns, zero where
   nothing is stored and past the last column, in an order that is the processor's own. */
typedef struct {
    void (*widen)(int dtype, const void *in, int64_t count, float *out);
    void (*narrow)(int dtype, const float *in, int64_t count, void *out);
    /* Brings x from the order of columns to that of expanded rows. */
    void (*order)(int dtype, float *x, int64_t words);
    /* A row's values (integer - zero) * scale, rounded to the dtype. */
    void (*unpack)(const Weight *weight, int64_t row, const float *scales, void *out);
    /* Products of four rows with count rows of x, at most FEW, of which every word of the first
       comes before that of the second: out[4 * row of x + row]. Without masks all columns are
       stored. */
    void (*dots)(int dtype, const uint64_t *const mask[4], const void *const values[4],
                 int64_t words, const float *x, int64_t count, float *out);
    void (*expand)(int dtype, const uint64_t *mask, const void *values, int64_t words, float *out);
    /* Products of four expanded rows with count rows of x: out[4 * row of x + row]. */
    void (*tile)(const float *rows, const float *x, int64_t count, int64_t words, float *out);
    /* A row with its zeros, of the dtype of its values, in the order of columns. */
    void (*dense)(int dtype, const uint64_t *mask, const void *values, int64_t words, void *out);
    /* As dots, of bfloat16 with bfloat16, both in the order of columns: of two rows with one of x;
       or NULL. */
    void (*pair_dot)(const uint64_t *const mask[2], const void *const values[2], int64_t words,
                     const uint16_t *x, float *out);
    /* The same of four rows with at most SOME of x. */
    void (*pair_dots)(const uint64_t *const mask[4], const void *const values[4], int64_t words,
                      const uint16_t *x, int64_t count, float *out);
    /* As tile, of the same. */
    void (*pair_tile)(const uint16_t *rows, const uint16_t *x, int64_t count, int64_t words,
                      float *out);
} Kernels;

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512bf16_kernels;
#endif

/* Call a function whose first arguments are constants, so that it is compiled for each. */
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

/* The place of a row's first value among those that are stored. */
INLINE int64_t
start_of(const Weight *weight, int64_t row)
{
    return weight->mask ? weight->starts[row] : row * weight->columns;
}

/* How many columns from first to last, not included, are stored. */
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

/* The order of processors that expand in that of columns. */
INLINE void as_it_is(int dtype, float *x, int64_t words) { (void)dtype, (void)x, (void)words; }

INLINE int size_of(int dtype) { return dtype == FP32 ? 4 : 2; }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
