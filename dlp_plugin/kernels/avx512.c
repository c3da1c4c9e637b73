/* Kernels for processors with AVX-512 and VBMI2, which expands 16-bit words under a mask: Intel
   since Ice Lake, AMD since Zen 4.

   Expanded bfloat16 rows have their own order: of every 32 columns, first the even and then the odd
   ones. So one shift and one mask turn 32 words into two vectors of float32. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#define FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,popcnt,fma,f16c"
#define TARGET __attribute__((target(FEATURES)))

/* The expand instruction with a memory operand is slow microcode on AMD. The empty asm statement
   keeps compilers from merging the load into it. */
#define EXPANDED(name, vector, bits, load, expand)         \
    TARGET INLINE vector name(bits mask, const void *from) \
    {                                                      \
        vector found = load(from);                         \
        __asm__("" : "+v"(found));                         \
        return expand(mask, found);                        \
    }

EXPANDED(expanded, __m512i, __mmask32, _mm512_loadu_si512, _mm512_maskz_expand_epi16)
EXPANDED(expanded_half, __m256i, __mmask16, _mm256_loadu_si256, _mm256_maskz_expand_epi16)
EXPANDED(expanded_floats, __m512, __mmask16, _mm512_loadu_ps, _mm512_maskz_expand_ps)

/* Makes two vectors of float32 of the next 32 columns, and moves the pointer past their values. */
TARGET INLINE void
two(int dtype, int masked, uint32_t mask, const uint8_t **at, __m512 *a, __m512 *b)
{
    mask = masked ? mask : ~(uint32_t)0;
    const uint8_t *second = *at + size_of(dtype) * _mm_popcnt_u32(mask & 0xffff);
    if (dtype == FP32) {
        *a = expanded_floats((__mmask16)mask, *at);
        *b = expanded_floats((__mmask16)(mask >> 16), second);
    } else if (dtype == FP16) {
        /* Expand each half by itself: extracting the upper half of a vector would be slower. */
        *a = _mm512_cvtph_ps(expanded_half((__mmask16)mask, *at));
        *b = _mm512_cvtph_ps(expanded_half((__mmask16)(mask >> 16), second));
    } else {
        __m512i words = masked ? expanded(mask, *at) : _mm512_loadu_si512(*at);
        /* A bfloat16 number is the upper half of a float32 number. */
        *a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        *b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
    }
    *at += size_of(dtype) * _mm_popcnt_u32(mask);
}

/* Returns the sums of the entries of four vectors. */
TARGET INLINE __m128
sums_of(const __m512 all[4])
{
    __m512 ab =
        _mm512_add_ps(_mm512_unpacklo_ps(all[0], all[1]), _mm512_unpackhi_ps(all[0], all[1]));
    __m512 cd =
        _mm512_add_ps(_mm512_unpacklo_ps(all[2], all[3]), _mm512_unpackhi_ps(all[2], all[3]));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Multiplies four rows at a time: they share the loads of x, and their dependent additions overlap.
   Within a row each step depends on the one before only by an addition to a pointer; popcounts are
   computed ahead. */
TARGET INLINE void
dots_of(int count, int dtype, int masked, const uint64_t *const mask[4],
        const void *const values[4], int64_t words, const float *x, float *out)
{
    __m512 sums[FEW][4];
    const uint8_t *at[4] = {values[0], values[1], values[2], values[3]};
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int row = 0; row < 4; row++)
            sums[i][row] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits[4] = {0};
        UNROLL for (int row = 0; row < 4; row++) {
            if (masked) {
                bits[row] = mask[row][word];
                _mm_prefetch((const char *)(mask[row] + word) + AHEAD, _MM_HINT_T0);
            }
            _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
        }
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 w[4][2];
            UNROLL for (int row = 0; row < 4; row++)
                two(dtype, masked, (uint32_t)(bits[row] >> 32 * half), &at[row], &w[row][0],
                    &w[row][1]);
            UNROLL for (int i = 0; i < count; i++)
                UNROLL for (int part = 0; part < 2; part++) {
                    int64_t column = 64 * (word * count + i) + 32 * half + 16 * part;
                    __m512 one = _mm512_loadu_ps(x + column);
                    UNROLL for (int row = 0; row < 4; row++)
                        sums[i][row] = _mm512_fmadd_ps(w[row][part], one, sums[i][row]);
                }
        }
    }
    UNROLL for (int i = 0; i < count; i++)
        _mm_storeu_ps(out + 4 * i, sums_of(sums[i]));
}

TARGET INLINE void
few_dots(int dtype, int masked, const uint64_t *const mask[4], const void *const values[4],
         int64_t words, const float *x, int64_t count, float *out)
{
    FOR_FEW(dots_of, count, dtype, masked, mask, values, words, x, out)
}

TARGET static void
dots(int dtype, const uint64_t *const mask[4], const void *const values[4], int64_t words,
     const float *x, int64_t count, float *out)
{
    FOR_EACH(few_dots, dtype, mask[0], mask, values, words, x, count, out)
}

TARGET INLINE void
expand_of(int dtype, int masked, const uint64_t *mask, const uint8_t *at, int64_t words,
          float *out)
{
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits = masked ? mask[word] : 0;
        for (int half = 0; half < 2; half++, bits >>= 32, out += 32) {
            __m512 a, b;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            two(dtype, masked, (uint32_t)bits, &at, &a, &b);
            _mm512_storeu_ps(out, a);
            _mm512_storeu_ps(out + 16, b);
        }
    }
}

TARGET static void
expand(int dtype, const uint64_t *mask, const void *values, int64_t words, float *out)
{
    FOR_EACH(expand_of, dtype, mask, mask, values, words, out)
}

TARGET static void
dense(int dtype, const uint64_t *mask, const void *values, int64_t words, void *out)
{
    if (dtype == FP32)
        return expand(FP32, mask, values, words, out);
    const uint8_t *at = values;
    uint16_t *to = out;
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits = ~(uint64_t)0;
        if (mask) {
            bits = mask[word];
            _mm_prefetch((const char *)(mask + word) + AHEAD, _MM_HINT_T0);
        }
        for (int half = 0; half < 2; half++, bits >>= 32, to += 32) {
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            _mm512_storeu_si512(to, expanded((uint32_t)bits, at));
            at += 2 * _mm_popcnt_u32((uint32_t)bits);
        }
    }
}

#define FOR_SOME(function, count, ...)            \
    switch (count) {                              \
    case 1: return function(1, __VA_ARGS__);      \
    case 2: return function(2, __VA_ARGS__);      \
    case 3: return function(3, __VA_ARGS__);      \
    case 4: return function(4, __VA_ARGS__);      \
    case 5: return function(5, __VA_ARGS__);      \
    default: return function(SOME, __VA_ARGS__);  \
    }

/* Four rows of W times six rows of x: 24 sums in registers, ten loads for 24 products. */
#define TILE(target, name, number, vector, load, product)                                   \
    target INLINE void name##_of(int count, const number *rows, const number *x,            \
                                 int64_t columns, float *out)                               \
    {                                                                                       \
        __m512 sums[SOME][4];                                                               \
        UNROLL for (int i = 0; i < count; i++)                                              \
            UNROLL for (int row = 0; row < 4; row++)                                        \
                sums[i][row] = _mm512_setzero_ps();                                         \
        for (int64_t column = 0; column < columns; column += 64 / (int64_t)sizeof *x) {     \
            vector w[4];                                                                    \
            UNROLL for (int row = 0; row < 4; row++)                                        \
                w[row] = load(rows + row * columns + column);                               \
            UNROLL for (int i = 0; i < count; i++) {                                        \
                vector one = load(x + i * columns + column);                                \
                UNROLL for (int row = 0; row < 4; row++)                                    \
                    sums[i][row] = product(one, w[row], sums[i][row]);                      \
            }                                                                               \
        }                                                                                   \
        UNROLL for (int i = 0; i < count; i++)                                              \
            _mm_storeu_ps(out + 4 * i, sums_of(sums[i]));                                   \
    }                                                                                       \
                                                                                            \
    target static void name(const number *rows, const number *x, int64_t count,             \
                            int64_t words, float *out)                                      \
    {                                                                                       \
        for (; count > SOME; count -= SOME, x += SOME * 64 * words, out += 4 * SOME)        \
            name##_of(SOME, rows, x, 64 * words, out);                                      \
        FOR_SOME(name##_of, count, rows, x, 64 * words, out)                                \
    }

TILE(TARGET, tile, float, __m512, _mm512_loadu_ps, _mm512_fmadd_ps)

/* Rounds to bfloat16: to nearest, ties to even. A NaN whose upper bits are all set would become
   zero, but products with 16-bit scales are never such a NaN. */
TARGET INLINE __m256i
rounded(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

TARGET INLINE __m256i
narrowed(int dtype, __m512 value)
{
    return dtype == FP16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : rounded(value);
}

TARGET INLINE void
put(int dtype, __m512 value, __mmask16 some, void *out)
{
    if (dtype == FP32)
        _mm512_mask_storeu_ps(out, some, value);
    else
        _mm256_mask_storeu_epi16(out, some, narrowed(dtype, value));
}

/* Byte and bit offset of each 4-bit integer, counted from an integer with an even index. */
static const uint16_t byte_of[33] = {0, 0, 1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7, 8,
                                     8, 9, 9,  10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16};
static const uint16_t bit_of[33] = {0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0,
                                    4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0};

/* Unpacks 32 4-bit integers to 16-bit words; the upper bits of these are not cleared. */
TARGET INLINE __m512i
nibbles(const uint8_t *packed, int64_t place)
{
    const void *at = packed + (uint64_t)place / 2;
    __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(at));
    bytes = _mm512_permutexvar_epi8(_mm512_loadu_si512(byte_of + (place & 1)), bytes);
    return _mm512_srlv_epi16(bytes, _mm512_loadu_si512(bit_of + (place & 1)));
}

TARGET INLINE __m512
scaled_of(__m512i integers, int zero, float scale)
{
    integers = _mm512_sub_epi32(integers, _mm512_set1_epi32(zero));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(scale));
}

/* 4-bit integers have only sixteen values per group: they are looked up in a vector. */
TARGET INLINE void
scaled(int dtype, int bits, const uint8_t *packed, int64_t place, int64_t count, int zero,
       float scale, void *out)
{
    uint8_t *to = out;
    if (bits == 8) {
        for (int64_t i = 0; i < count; i += 16) {
            __m128i bytes = _mm_loadu_si128((const void *)(packed + place + i));
            __m512 values = scaled_of(_mm512_cvtepu8_epi32(bytes), zero, scale);
            put(dtype, values, (__mmask16)-1, to + i * size_of(dtype));
        }
        return;
    }
    __m512i all = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 values = scaled_of(all, zero, scale);
    if (dtype == FP32) {
        for (int64_t i = 0; i < count; i += 16) {
            __m256i words = _mm512_castsi512_si256(nibbles(packed, place + i));
            __m512 some = _mm512_permutexvar_ps(_mm512_cvtepu16_epi32(words), values);
            _mm512_storeu_ps(to + 4 * i, some);
        }
        return;
    }
    /* The table holds the values twice: an index's fifth bit belongs to the next integer. */
    __m512i table = _mm512_broadcast_i64x4(narrowed(dtype, values));
    for (int64_t i = 0; i < count; i += 64)
        for (int half = 0; half < 64; half += 32) {
            __m512i found = _mm512_permutexvar_epi16(nibbles(packed, place + i + half), table);
            _mm512_storeu_si512(to + 2 * (i + half), found);
        }
}

#include "unpack.h"

TARGET static void
widen(int dtype, const void *in, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 some = count - i < 16 ? (__mmask16)((1 << (count - i)) - 1) : (__mmask16)-1;
        __m512 value;
        if (dtype == FP32) {
            value = _mm512_maskz_loadu_ps(some, (const float *)in + i);
        } else {
            __m256i words = _mm256_maskz_loadu_epi16(some, (const uint16_t *)in + i);
            value = dtype == FP16 ? _mm512_cvtph_ps(words)
                                  : _mm512_castsi512_ps(
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
        }
        _mm512_mask_storeu_ps(out + i, some, value);
    }
}

TARGET static void
narrow(int dtype, const float *in, int64_t count, void *out)
{
    uint8_t *to = out;
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 some = count - i < 16 ? (__mmask16)((1 << (count - i)) - 1) : (__mmask16)-1;
        __m512 value = _mm512_maskz_loadu_ps(some, in + i);
        __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        value = _mm512_mask_mov_ps(value, none, _mm512_set1_ps(NAN));
        put(dtype, value, some, to + i * size_of(dtype));
    }
}

TARGET static void
order(int dtype, float *x, int64_t words)
{
    if (dtype != BF16)
        return;
    __m512i even = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 1);
    __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (float *end = x + 64 * words; x < end; x += 32) {
        __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        _mm512_storeu_ps(x, _mm512_permutex2var_ps(a, even, b));
        _mm512_storeu_ps(x + 16, _mm512_permutex2var_ps(a, odd, b));
    }
}

/* With the BF16 extension (Intel since Cooper Lake, AMD since Zen 4) two bfloat16 rows need not be
   converted to float32: one instruction multiplies and adds 32 columns. Rows and x have the normal
   order of columns. The instruction treats numbers below 2 ** -126 as zero. */
#define BF16_TARGET __attribute__((target(FEATURES ",avx512bf16")))

BF16_TARGET INLINE __m512
pairs(__m512i a, __m512i b, __m512 sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

BF16_TARGET INLINE void
pair_dots_of(int count, int masked, const uint64_t *const mask[4], const void *const values[4],
             int64_t words, const uint16_t *x, float *out)
{
    __m512 sums[SOME][4];
    const uint8_t *at[4] = {values[0], values[1], values[2], values[3]};
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int row = 0; row < 4; row++)
            sums[i][row] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        UNROLL for (int row = 0; row < 4; row++) {
            _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
        }
        UNROLL for (int half = 0; half < 2; half++) {
            __m512i w[4];
            UNROLL for (int row = 0; row < 4; row++) {
                uint32_t some = 0; /* read from memory each time: there are too few registers */
                if (masked)
                    memcpy(&some, (const uint8_t *)(mask[row] + word) + 4 * half, 4);
                w[row] = masked ? expanded(some, at[row]) : _mm512_loadu_si512(at[row]);
                at[row] += 2 * (masked ? _mm_popcnt_u32(some) : 32);
            }
            UNROLL for (int i = 0; i < count; i++) {
                __m512i one = _mm512_loadu_si512(x + 64 * (word * count + i) + 32 * half);
                UNROLL for (int row = 0; row < 4; row++)
                    sums[i][row] = pairs(w[row], one, sums[i][row]);
            }
        }
    }
    UNROLL for (int i = 0; i < count; i++)
        _mm_storeu_ps(out + 4 * i, sums_of(sums[i]));
}

/* With one row of x the speed is limited by memory, and two streams of values are read faster than
   four. All products add the columns in the same order, so that the result for a row of x has the
   same bits whichever rows are multiplied with it. */
BF16_TARGET INLINE void
pair_dot_of(int masked, const uint64_t *const mask[2], const void *const values[2], int64_t words,
            const uint16_t *x, float *out)
{
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const uint8_t *at[2] = {values[0], values[1]};
    for (int64_t word = 0; word < words; word++) {
        __m512i low = _mm512_loadu_si512(x + 64 * word);
        __m512i high = _mm512_loadu_si512(x + 64 * word + 32);
        UNROLL for (int row = 0; row < 2; row++) {
            uint64_t bits = masked ? mask[row][word] : ~(uint64_t)0;
            const uint8_t *second = at[row] + 2 * (masked ? _mm_popcnt_u32((uint32_t)bits) : 32);
            _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
            __m512i a = masked ? expanded((uint32_t)bits, at[row]) : _mm512_loadu_si512(at[row]);
            __m512i b =
                masked ? expanded((uint32_t)(bits >> 32), second) : _mm512_loadu_si512(second);
            sums[row] = pairs(b, high, pairs(a, low, sums[row]));
            at[row] += 2 * (masked ? _mm_popcnt_u64(bits) : 64);
        }
    }
    sums[2] = sums[3] = sums[0];
    _mm_storel_pi((__m64 *)out, sums_of(sums));
}

BF16_TARGET static void
pair_dot(const uint64_t *const mask[2], const void *const values[2], int64_t words,
         const uint16_t *x, float *out)
{
    if (mask[0])
        pair_dot_of(1, mask, values, words, x, out);
    else
        pair_dot_of(0, mask, values, words, x, out);
}

BF16_TARGET static void
pair_dots(const uint64_t *const mask[4], const void *const values[4], int64_t words,
          const uint16_t *x, int64_t count, float *out)
{
    if (mask[0])
        FOR_SOME(pair_dots_of, count, 1, mask, values, words, x, out)
    FOR_SOME(pair_dots_of, count, 0, mask, values, words, x, out)
}

TILE(BF16_TARGET, pair_tile, uint16_t, __m512i, _mm512_loadu_si512, pairs)

const Kernels avx512_kernels = {widen, narrow, order, unpack, dots,
                                expand, tile, dense, NULL, NULL, NULL};
const Kernels avx512bf16_kernels = {widen, narrow, order, unpack, dots,
                                    expand, tile, dense, pair_dot, pair_dots, pair_tile};
#endif
