/* Kernels for processors with AVX2 and FMA, which most x86 processors since 2013 have.

   AVX2 has no instruction that expands values under a mask. Instead, each byte of the mask selects
   one of 256 shuffles, which moves the next values to their 8 columns. The table of shuffles is
   made when the library is loaded. The speed is limited by instructions, not by memory. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,popcnt,f16c,bmi,bmi2")))

/* Shuffles for vpshufb, to which 0x80 means zero. `upper` moves bfloat16 values to the upper halves
   of float32. */
static _Alignas(32) uint8_t upper[256][32];
static _Alignas(16) uint8_t words_at[256][16];
static _Alignas(8) uint8_t floats_at[256][8];

__attribute__((constructor)) static void
fill(void)
{
    memset(upper, 0x80, sizeof upper);
    memset(words_at, 0x80, sizeof words_at);
    memset(floats_at, 0x80, sizeof floats_at);
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, place = 0; column < 8; column++)
            if (mask >> column & 1) {
                for (int byte = 0; byte < 2; byte++) {
                    upper[mask][4 * column + 2 + byte] = (uint8_t)(2 * place + byte);
                    words_at[mask][2 * column + byte] = (uint8_t)(2 * place + byte);
                }
                floats_at[mask][column] = (uint8_t)place++;
            }
}

/* A byte of the mask times 32: its offset in `upper`, with the same number of bits set. Rotating
   takes a single instruction that writes to another register. */
INLINE uint64_t
byte_of(uint64_t bits, int part)
{
    int by = (8 * part + 59) % 64;
    return (bits >> by | bits << (64 - by)) & 0x1fe0;
}

/* Returns the next 8 columns as float32, and moves the pointer past their values. */
TARGET INLINE __m256
eight(int dtype, int masked, uint64_t byte, const uint8_t **at)
{
    const uint8_t *from = *at;
    *at += (masked ? _mm_popcnt_u64(byte) : 8) * size_of(dtype);
    if (dtype == FP32) {
        __m256 found = _mm256_loadu_ps((const float *)from);
        if (!masked)
            return found;
        const void *eight_places = *floats_at + byte / 4;
        __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(eight_places));
        found = _mm256_permutevar8x32_ps(found, places);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), found);
    }
    __m128i found = _mm_loadu_si128((const void *)from);
    if (dtype == FP16) {
        if (masked)
            found = _mm_shuffle_epi8(found, _mm_load_si128((const void *)(*words_at + byte / 2)));
        return _mm256_cvtph_ps(found);
    }
    if (!masked)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16));
    /* Both halves get all eight values, because the shuffle cannot move bytes between halves. */
    __m256i places = _mm256_load_si256((const void *)(*upper + byte));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(found), places));
}

TARGET INLINE float
sum_of(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Returns the sums of the entries of four vectors. */
TARGET INLINE __m128
sums_of(const __m256 all[4])
{
    __m256 pairs = _mm256_hadd_ps(all[0], all[1]), others = _mm256_hadd_ps(all[2], all[3]);
    __m256 sums = _mm256_hadd_ps(pairs, others);
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* Multiplies four rows at a time: they share the loads of x, and their dependent additions overlap.
   With FEW rows of x it takes two, because the sums of four would need all registers. */
TARGET INLINE void
dots_of(int count, int dtype, int masked, const uint64_t *const mask[4],
        const void *const values[4], int64_t words, const float *x, float *out)
{
    const int together = count < FEW ? 4 : 2;
    for (int first = 0; first < 4; first += together) {
        __m256 sums[FEW][4];
        const uint8_t *at[4];
        UNROLL for (int row = 0; row < together; row++) {
            at[row] = values[first + row];
            UNROLL for (int i = 0; i < count; i++)
                sums[i][row] = _mm256_setzero_ps();
        }
        for (int64_t word = 0; word < words; word++) {
            uint64_t bits[4] = {0};
            UNROLL for (int row = 0; row < together; row++) {
                if (masked) {
                    bits[row] = mask[first + row][word];
                    _mm_prefetch((const char *)(mask[first + row] + word) + AHEAD, _MM_HINT_T0);
                }
                _mm_prefetch((const char *)at[row] + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char *)at[row] + AHEAD + 64, _MM_HINT_T0);
            }
            UNROLL for (int part = 0; part < 8; part++)
                UNROLL for (int row = 0; row < together; row++) {
                    __m256 w = eight(dtype, masked, byte_of(bits[row], part), &at[row]);
                    UNROLL for (int i = 0; i < count; i++) {
                        __m256 one = _mm256_loadu_ps(x + 64 * (word * count + i) + 8 * part);
                        sums[i][row] = _mm256_fmadd_ps(w, one, sums[i][row]);
                    }
                }
        }
        UNROLL for (int i = 0; i < count; i++)
            for (int row = 0; row < together; row++)
                out[4 * i + first + row] = sum_of(sums[i][row]);
    }
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
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
        for (int part = 0; part < 8; part++, out += 8)
            _mm256_storeu_ps(out, eight(dtype, masked, byte_of(bits, part), &at));
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
    uint8_t *to = out;
    for (int64_t word = 0; word < words; word++) {
        uint64_t bits = mask ? mask[word] : ~(uint64_t)0;
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
        for (int i = 0; i < 8; i++, bits >>= 8, to += 16) {
            __m128i place = _mm_load_si128((const void *)words_at[(uint8_t)bits]);
            __m128i found = _mm_shuffle_epi8(_mm_loadu_si128((const void *)at), place);
            _mm_storeu_si128((void *)to, found);
            at += 2 * _mm_popcnt_u32((uint8_t)bits);
        }
    }
}

/* Four rows of W times three rows of x: their twelve sums fit in the sixteen registers. */
TARGET INLINE void
tile_of(int count, const float *rows, const float *x, int64_t columns, float *out)
{
    __m256 sums[3][4];
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int row = 0; row < 4; row++)
            sums[i][row] = _mm256_setzero_ps();
    for (int64_t column = 0; column < columns; column += 8) {
        __m256 one[3];
        UNROLL for (int i = 0; i < count; i++)
            one[i] = _mm256_loadu_ps(x + i * columns + column);
        UNROLL for (int row = 0; row < 4; row++) {
            __m256 w = _mm256_loadu_ps(rows + row * columns + column);
            UNROLL for (int i = 0; i < count; i++)
                sums[i][row] = _mm256_fmadd_ps(one[i], w, sums[i][row]);
        }
    }
    UNROLL for (int i = 0; i < count; i++)
        _mm_storeu_ps(out + 4 * i, sums_of(sums[i]));
}

TARGET static void
tile(const float *rows, const float *x, int64_t count, int64_t words, float *out)
{
    int64_t columns = 64 * words;
    for (; count >= 3; count -= 3, x += 3 * columns, out += 12)
        tile_of(3, rows, x, columns, out);
    if (count == 2)
        tile_of(2, rows, x, columns, out);
    else if (count == 1)
        tile_of(1, rows, x, columns, out);
}

/* Rounds eight values to 16 bits: to nearest, ties to even. */
TARGET INLINE __m128i
rounded(int dtype, __m256 value)
{
    if (dtype == FP16)
        return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    bits = _mm256_srli_epi32(bits, 16);
    __m256i none = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), none);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

/* Unpacks eight 4-bit integers, the first of which has index place, to 32-bit words. */
TARGET INLINE __m256i
nibbles(const uint8_t *packed, int64_t place)
{
    uint64_t bits;
    memcpy(&bits, packed + place / 2, 8);
    __m256i all = _mm256_set1_epi32((int)(bits >> 4 * (place % 2)));
    all = _mm256_srlv_epi32(all, _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    return _mm256_and_si256(all, _mm256_set1_epi32(15));
}

TARGET INLINE void
scaled(int dtype, int bits, const uint8_t *packed, int64_t place, int64_t count, int zero,
       float scale, void *out)
{
    uint8_t *to = out;
    for (int64_t i = 0; i < count; i += 8, to += 8 * size_of(dtype)) {
        const uint8_t *bytes = packed + place + i;
        __m256i found = bits == 4 ? nibbles(packed, place + i)
                                  : _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)bytes));
        found = _mm256_sub_epi32(found, _mm256_set1_epi32(zero));
        __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(found), _mm256_set1_ps(scale));
        if (dtype == FP32)
            _mm256_storeu_ps((float *)to, value);
        else
            _mm_storeu_si128((void *)to, rounded(dtype, value));
    }
}

#include "unpack.h"

TARGET static void
widen(int dtype, const void *in, int64_t count, float *out)
{
    uint8_t spare[32] = {0};
    for (const uint8_t *from = in; count > 0; count -= 8, out += 8, from += 8 * size_of(dtype)) {
        const uint8_t *at = from;
        if (count < 8) {
            float last[8];
            memcpy(spare, from, (size_t)(count * size_of(dtype)));
            at = spare;
            _mm256_storeu_ps(last, eight(dtype, 0, 0, &at));
            memcpy(out, last, (size_t)count * 4);
            return;
        }
        _mm256_storeu_ps(out, dtype == FP32   ? eight(FP32, 0, 0, &at)
                              : dtype == FP16 ? eight(FP16, 0, 0, &at)
                                              : eight(BF16, 0, 0, &at));
    }
}

TARGET static void
narrow(int dtype, const float *in, int64_t count, void *out)
{
    uint8_t *to = out;
    if (dtype == FP32) {
        memcpy(out, in, (size_t)count * 4);
        return;
    }
    for (; count > 0; count -= 8, in += 8, to += 16) {
        float eight_in[8] = {0};
        uint16_t eight_out[8];
        int64_t some = count < 8 ? count : 8;
        memcpy(eight_in, in, (size_t)some * 4);
        _mm_storeu_si128((void *)eight_out, rounded(dtype, _mm256_loadu_ps(eight_in)));
        memcpy(to, eight_out, (size_t)some * 2);
    }
}

const Kernels avx2_kernels = {widen, narrow, as_it_is, unpack, dots,
                              expand, tile, dense, NULL, NULL, NULL};
#endif
