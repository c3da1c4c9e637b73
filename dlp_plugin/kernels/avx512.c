/* Processors with AVX-512 that expand words under a mask (VBMI2): Intel since Ice Lake, AMD since
   Zen 4.

   Expanded bfloat16 rows hold, of every 32 columns, first the even ones and then the odd ones:
   so 32 words become two vectors of float32 by one shift and one mask. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#define FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,popcnt,fma,f16c"
#define TARGET __attribute__((target(FEATURES)))

/* Two vectors of float32 of the next 32 columns, and the pointer moved past their values. */
TARGET INLINE void
two(int dtype, int masked, uint32_t mask, const uint8_t **at, __m512 *a, __m512 *b)
{
    int64_t count = masked ? _mm_popcnt_u32(mask) : 32;
    if (dtype == FP32) {
        __m512 first = _mm512_loadu_ps(*at);
        int64_t half = masked ? _mm_popcnt_u32(mask & 0xffff) : 16;
        __m512 second = _mm512_loadu_ps(*at + 4 * half);
        *a = masked ? _mm512_maskz_expand_ps((__mmask16)mask, first) : first;
        *b = masked ? _mm512_maskz_expand_ps((__mmask16)(mask >> 16), second) : second;
        *at += 4 * count;
        return;
    }
    /* The form of expand that takes a register: the one that reads memory is microcode on AMD. */
    __m512i words = _mm512_loadu_si512(*at);
    if (masked)
        words = _mm512_maskz_expand_epi16(mask, words);
    *at += 2 * count;
    if (dtype == FP16) {
        *a = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        *b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
    } else {
        /* A bfloat16 number is the upper half of a float32 number. */
        *a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        *b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
    }
}

/* Two rows at a time share what they load of x, and their chains of additions overlap. The chain
   that a row waits for is one addition to a pointer: popcounts run ahead of it. */
TARGET INLINE void
dots_of(int count, int dtype, int masked, const uint64_t *const mask[2],
        const void *const values[2], int64_t words, const float *x, float *out)
{
    const int chains = count == 1 ? 4 : 2;
    __m512 sums[FEW][2][4];
    const uint8_t *at[2] = {values[0], values[1]};
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 2; row++)
            for (int chain = 0; chain < chains; chain++)
                sums[i][row][chain] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits[2] = {0, 0};
        for (int row = 0; row < 2; row++) {
            if (masked)
                bits[row] = mask[row][word];
            _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
        }
        for (int half = 0; half < 2; half++) {
            __m512 w[2][2];
            for (int row = 0; row < 2; row++)
                two(dtype, masked, (uint32_t)(bits[row] >> 32 * half), &at[row], &w[row][0],
                    &w[row][1]);
            for (int i = 0; i < count; i++)
                for (int part = 0; part < 2; part++) {
                    int64_t column = 64 * word + 32 * half + 16 * part;
                    __m512 one = _mm512_loadu_ps(x + i * 64 * words + column);
                    int chain = (2 * half + part) % chains;
                    for (int row = 0; row < 2; row++)
                        sums[i][row][chain] =
                            _mm512_fmadd_ps(w[row][part], one, sums[i][row][chain]);
                }
        }
    }
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 2; row++) {
            for (int chain = chains / 2; chain; chain /= 2)
                for (int first = 0; first < chain; first++)
                    sums[i][row][first] =
                        _mm512_add_ps(sums[i][row][first], sums[i][row][first + chain]);
            out[2 * i + row] = _mm512_reduce_add_ps(sums[i][row][0]);
        }
}

TARGET INLINE void
few_dots(int dtype, int masked, const uint64_t *const mask[2], const void *const values[2],
         int64_t words, const float *x, int64_t count, float *out)
{
    FOR_FEW(dots_of, count, dtype, masked, mask, values, words, x, out)
}

TARGET static void
dots(int dtype, const uint64_t *const mask[2], const void *const values[2], int64_t words,
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
    if (dtype == FP32) {
        expand(FP32, mask, values, words, out);
        return;
    }
    const uint8_t *at = values;
    uint16_t *to = out;
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits = mask ? mask[word] : ~(uint64_t)0;
        for (int half = 0; half < 2; half++, bits >>= 32, to += 32) {
            __m512i found = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            _mm512_storeu_si512(to, _mm512_maskz_expand_epi16((uint32_t)bits, found));
            at += 2 * _mm_popcnt_u32((uint32_t)bits);
        }
    }
}

/* Four rows of W times six of x: 24 sums in registers, ten loads for 24 products. */
TARGET INLINE void
tile_of(int count, const float *rows, const float *x, int64_t columns, float *out)
{
    __m512 sums[6][4];
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 4; row++)
            sums[i][row] = _mm512_setzero_ps();
    for (int64_t column = 0; column < columns; column += 16) {
        __m512 w[4];
        for (int row = 0; row < 4; row++)
            w[row] = _mm512_loadu_ps(rows + row * columns + column);
        for (int i = 0; i < count; i++) {
            __m512 one = _mm512_loadu_ps(x + i * columns + column);
            for (int row = 0; row < 4; row++)
                sums[i][row] = _mm512_fmadd_ps(one, w[row], sums[i][row]);
        }
    }
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 4; row++)
            out[4 * i + row] = _mm512_reduce_add_ps(sums[i][row]);
}

TARGET static void
tile(const float *rows, const float *x, int64_t count, int64_t words, float *out)
{
    int64_t columns = 64 * words;
    for (; count >= 6; count -= 6, x += 6 * columns, out += 24)
        tile_of(6, rows, x, columns, out);
    switch (count) {
    case 1: tile_of(1, rows, x, columns, out); break;
    case 2: tile_of(2, rows, x, columns, out); break;
    case 3: tile_of(3, rows, x, columns, out); break;
    case 4: tile_of(4, rows, x, columns, out); break;
    case 5: tile_of(5, rows, x, columns, out); break;
    }
}

TARGET static void
nibbles(const uint8_t *pairs, int64_t count, uint8_t *out)
{
    for (int64_t i = 0; i < count; i += 64) {
        _mm_prefetch((const char *)pairs + i / 2 + AHEAD, _MM_HINT_T0);
        __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(pairs + i / 2)));
        words = _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
        _mm512_storeu_si512(out + i, _mm512_and_si512(words, _mm512_set1_epi8(15)));
    }
}

/* To the nearest, of two that are equally near to the even one. Where all upper bits of a NaN are
   set it would become zero, which products with scales of 16 bits cannot be. */
TARGET INLINE __m256i
rounded(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

TARGET INLINE void
put(int dtype, __m512 value, __mmask16 some, void *out)
{
    if (dtype == FP32)
        _mm512_mask_storeu_ps(out, some, value);
    else if (dtype == FP16)
        _mm256_mask_storeu_epi16(out, some, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm256_mask_storeu_epi16(out, some, rounded(value));
}

TARGET INLINE void
scaled(int dtype, const uint8_t *integers, int64_t count, int zero, float scale, void *out)
{
    uint8_t *to = out;
    for (int64_t i = 0; i < count; i += 16) {
        __m512i found = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(integers + i)));
        found = _mm512_sub_epi32(found, _mm512_set1_epi32(zero));
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(found), _mm512_set1_ps(scale));
        put(dtype, value, (__mmask16)-1, to + i * size_of(dtype));
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

/* With products of pairs of bfloat16 (BF16: Intel since Cooper Lake, AMD since Zen 4), two
   bfloat16 rows need not become float32: a product and a sum of 32 columns are one instruction.
   Rows and x are in the order of columns. It takes what is less than 2 ** -126 as zero. */
#define BF16_TARGET __attribute__((target(FEATURES ",avx512bf16")))

BF16_TARGET INLINE __m512
pairs(__m512 sum, __m512i a, __m512i b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

BF16_TARGET INLINE void
pair_dots_of(int count, int masked, const uint64_t *const mask[2], const void *const values[2],
             int64_t words, const uint16_t *x, float *out)
{
    __m512 sums[FEW][2][2];
    const uint8_t *at[2] = {values[0], values[1]};
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 2; row++)
            sums[i][row][0] = sums[i][row][1] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        __m512i w[2][2];
        for (int row = 0; row < 2; row++) {
            uint64_t bits = masked ? mask[row][word] : ~(uint64_t)0;
            int64_t low = masked ? _mm_popcnt_u32((uint32_t)bits) : 32;
            _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
            _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
            w[row][0] = _mm512_loadu_si512(at[row]);
            w[row][1] = _mm512_loadu_si512(at[row] + 2 * low);
            at[row] += 2 * (masked ? _mm_popcnt_u64(bits) : 64);
            if (masked) {
                w[row][0] = _mm512_maskz_expand_epi16((uint32_t)bits, w[row][0]);
                w[row][1] = _mm512_maskz_expand_epi16((uint32_t)(bits >> 32), w[row][1]);
            }
        }
        for (int i = 0; i < count; i++)
            for (int half = 0; half < 2; half++) {
                __m512i one = _mm512_loadu_si512(x + 64 * (i * words + word) + 32 * half);
                for (int row = 0; row < 2; row++)
                    sums[i][row][half] = pairs(sums[i][row][half], w[row][half], one);
            }
    }
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 2; row++)
            out[2 * i + row] =
                _mm512_reduce_add_ps(_mm512_add_ps(sums[i][row][0], sums[i][row][1]));
}

BF16_TARGET static void
pair_dots(const uint64_t *const mask[2], const void *const values[2], int64_t words,
          const uint16_t *x, int64_t count, float *out)
{
    if (mask[0]) {
        FOR_FEW(pair_dots_of, count, 1, mask, values, words, x, out)
    } else {
        FOR_FEW(pair_dots_of, count, 0, mask, values, words, x, out)
    }
}

BF16_TARGET INLINE void
pair_tile_of(int count, const uint16_t *rows, const uint16_t *x, int64_t columns, float *out)
{
    __m512 sums[6][4];
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 4; row++)
            sums[i][row] = _mm512_setzero_ps();
    for (int64_t column = 0; column < columns; column += 32) {
        __m512i w[4];
        for (int row = 0; row < 4; row++)
            w[row] = _mm512_loadu_si512(rows + row * columns + column);
        for (int i = 0; i < count; i++) {
            __m512i one = _mm512_loadu_si512(x + i * columns + column);
            for (int row = 0; row < 4; row++)
                sums[i][row] = pairs(sums[i][row], one, w[row]);
        }
    }
    for (int i = 0; i < count; i++)
        for (int row = 0; row < 4; row++)
            out[4 * i + row] = _mm512_reduce_add_ps(sums[i][row]);
}

BF16_TARGET static void
pair_tile(const uint16_t *rows, const uint16_t *x, int64_t count, int64_t words, float *out)
{
    int64_t columns = 64 * words;
    for (; count >= 6; count -= 6, x += 6 * columns, out += 24)
        pair_tile_of(6, rows, x, columns, out);
    switch (count) {
    case 1: pair_tile_of(1, rows, x, columns, out); break;
    case 2: pair_tile_of(2, rows, x, columns, out); break;
    case 3: pair_tile_of(3, rows, x, columns, out); break;
    case 4: pair_tile_of(4, rows, x, columns, out); break;
    case 5: pair_tile_of(5, rows, x, columns, out); break;
    }
}

const Kernels avx512_kernels = {widen, narrow, order, nibbles, unpack, dots,
                                expand, tile, dense, NULL, NULL};
const Kernels avx512bf16_kernels = {widen, narrow, order, nibbles, unpack, dots,
                                    expand, tile, dense, pair_dots, pair_tile};
#endif
