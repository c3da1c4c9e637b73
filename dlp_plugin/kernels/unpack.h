/* Included by each processor's file, once it has TARGET and scaled: a row's integers as values.

   Of a group of columns the integers that are stored are as many as its mask has bits; what a
   vector writes beyond them is written again by the next group, or is not looked at. */
TARGET INLINE void
unpack_of(int dtype, const Weight *weight, int64_t row, const uint64_t *mask,
          const uint8_t *integers, const float *scales, uint8_t *out)
{
    int64_t width = weight->groups ? weight->columns / weight->groups : 0;
    const uint8_t *zeros = weight->zero ? weight->zero + row * weight->groups : NULL;
    for (int64_t group = 0; group < weight->groups; group++) {
        int64_t count = mask ? ones(mask, group * width, (group + 1) * width) : width;
        int zero = zeros ? zeros[group] : 1 << (weight->bits - 1);
        scaled(dtype, integers, count, zero, scales[group], out);
        integers += count;
        out += count * size_of(dtype);
    }
    memset(out, 0, (size_t)(SPARE * size_of(dtype))); /* what is loaded beyond is finite */
}

TARGET static void
unpack(const Weight *weight, int64_t row, const uint64_t *mask, const uint8_t *integers,
       const float *scales, void *out)
{
    if (weight->dtype == BF16)
        unpack_of(BF16, weight, row, mask, integers, scales, out);
    else if (weight->dtype == FP16)
        unpack_of(FP16, weight, row, mask, integers, scales, out);
    else
        unpack_of(FP32, weight, row, mask, integers, scales, out);
}
