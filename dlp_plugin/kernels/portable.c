/* Kernels for any processor with a C compiler: loops over the bits that are set in the mask. */
#include "kernels.h"

static float
of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = half & 0x7fff;
    float found;
    if (bits < 0x400) { /* zero or subnormal */
        found = (float)bits * 0x1p-24f;
        memcpy(&bits, &found, 4);
    } else {
        bits = (bits << 13) + (bits < 0x7c00 ? 112u << 23 : 224u << 23);
    }
    bits |= sign;
    memcpy(&found, &bits, 4);
    return found;
}

static uint16_t
to_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return sign | 0x7e00;
    if (bits >= 0x47800000) /* 65536 and more */
        return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: adding 0.5 rounds to multiples of 2 ** -24 */
        float sum;
        memcpy(&sum, &bits, 4);
        sum += 0.5f;
        memcpy(&bits, &sum, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

static uint16_t
to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float
float_of(int dtype, const void *values, int64_t place)
{
    const uint8_t *at = (const uint8_t *)values + place * size_of(dtype);
    uint32_t bits;
    uint16_t half;
    float found;
    memcpy(&half, at, 2);
    if (dtype == FP16)
        return of_half(half);
    bits = (uint32_t)half << 16;
    if (dtype == FP32)
        memcpy(&bits, at, 4);
    memcpy(&found, &bits, 4);
    return found;
}

INLINE void
put(int dtype, float value, void *out, int64_t place)
{
    if (dtype == FP32) {
        ((float *)out)[place] = value;
    } else {
        uint16_t half = dtype == FP16 ? to_half(value) : to_bfloat16(value);
        memcpy((uint8_t *)out + 2 * place, &half, 2);
    }
}

static float
sum_of(const float sums[8])
{
    float first = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return first + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/* Multiplies one row of x at a time, with four sums, so that additions need not wait for one
   another. */
INLINE void
dots_of(int dtype, int masked, const uint64_t *const mask[4], const void *const values[4],
        int64_t words, const float *x, int64_t count, float *out)
{
    for (int64_t i = 0; i < 4 * count; i++) {
        const uint64_t *bits_of = mask[i % 4];
        const float *at = x + i / 4 * 64;
        float sums[4] = {0};
        for (int64_t word = 0, place = 0; word < words; word++, at += 64 * count) {
            uint64_t bits = masked ? bits_of[word] : ~(uint64_t)0;
            int left = __builtin_popcountll(bits);
            for (; left >= 4; left -= 4)
                for (int chain = 0; chain < 4; chain++, bits &= bits - 1)
                    sums[chain] += float_of(dtype, values[i % 4], place++) *
                                   at[__builtin_ctzll(bits)];
            for (; left; left--, bits &= bits - 1)
                sums[left] += float_of(dtype, values[i % 4], place++) * at[__builtin_ctzll(bits)];
        }
        out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

static void
dots(int dtype, const uint64_t *const mask[4], const void *const values[4], int64_t words,
     const float *x, int64_t count, float *out)
{
    FOR_EACH(dots_of, dtype, mask[0], mask, values, words, x, count, out)
}

INLINE void
expand_of(int dtype, int masked, const uint64_t *mask, const void *values, int64_t words,
          float *out)
{
    memset(out, 0, (size_t)words * 64 * 4);
    for (int64_t word = 0, place = 0; word < words; word++) {
        uint64_t bits = masked ? mask[word] : ~(uint64_t)0;
        for (; bits; bits &= bits - 1)
            out[64 * word + __builtin_ctzll(bits)] = float_of(dtype, values, place++);
    }
}

static void
expand(int dtype, const uint64_t *mask, const void *values, int64_t words, float *out)
{
    FOR_EACH(expand_of, dtype, mask, mask, values, words, out)
}

static void
dense(int dtype, const uint64_t *mask, const void *values, int64_t words, void *out)
{
    int64_t size = size_of(dtype);
    const uint8_t *from = values;
    memset(out, 0, (size_t)(words * 64 * size));
    for (int64_t word = 0; word < words; word++)
        for (uint64_t bits = mask ? mask[word] : ~(uint64_t)0; bits; bits &= bits - 1, from += size)
            memcpy((uint8_t *)out + (64 * word + __builtin_ctzll(bits)) * size, from, (size_t)size);
}

/* Eight sums per product, which compilers turn into vectors. */
static void
tile(const float *rows, const float *x, int64_t count, int64_t words, float *out)
{
    int64_t columns = 64 * words;
    for (int64_t i = 0; i < count; i++, x += columns)
        for (int row = 0; row < 4; row++) {
            const float *w = rows + row * columns;
            float sums[8] = {0};
            for (int64_t column = 0; column < columns; column += 8)
                for (int lane = 0; lane < 8; lane++)
                    sums[lane] += w[column + lane] * x[column + lane];
            out[4 * i + row] = sum_of(sums);
        }
}

INLINE void
scaled(int dtype, int bits, const uint8_t *packed, int64_t place, int64_t count, int zero,
       float scale, void *out)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t at = place + i;
        int integer = bits == 8 ? packed[at] : packed[at / 2] >> 4 * (at % 2) & 15;
        put(dtype, (float)(integer - zero) * scale, out, i);
    }
}

#define TARGET
#include "unpack.h"

static void
widen(int dtype, const void *in, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = float_of(dtype, in, i);
}

static void
narrow(int dtype, const float *in, int64_t count, void *out)
{
    for (int64_t i = 0; i < count; i++)
        put(dtype, in[i], out, i);
}

const Kernels portable_kernels = {widen, narrow, as_it_is, unpack, dots,
                                  expand, tile, dense, NULL, NULL, NULL};
