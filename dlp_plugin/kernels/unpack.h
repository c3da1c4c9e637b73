/* Unpacks a row's integers to values. Each processor's file includes it after defining TARGET and
   scaled(), which converts count integers, the first of which has index place.

   A group has as many stored integers as its mask has bits set. Vectors write past the group's
   end; the next group overwrites that, or nobody reads it. */
TARGET INLINE void
unpack_of(int dtype, int bits, const Weight *weight, int64_t row, const float *scales,
          uint8_t *out)
{
    const uint64_t *mask = mask_of(weight, row);
    int64_t place = start_of(weight, row);
    int64_t width = weight->groups ? weight->columns / weight->groups : 0;
    const uint8_t *zeros = weight->zero ? weight->zero + row * weight->groups : NULL;
    for (int64_t group = 0; group < weight->groups; group++) {
        int64_t count = mask ? ones(mask, group * width, (group + 1) * width) : width;
        int zero = zeros ? zeros[group] : 1 << (bits - 1);
        scaled(dtype, bits, weight->packed, place, count, zero, scales[group], out);
        place += count;
        out += count * size_of(dtype);
    }
    memset(out, 0, (size_t)(SPARE * size_of(dtype))); /* loads past the end find finite values */
}

#define UNPACK(dtype)                                                 \
    case dtype:                                                       \
        if (weight->bits == 4)                                        \
            unpack_of(dtype, 4, weight, row, scales, out);            \
        else                                                          \
            unpack_of(dtype, 8, weight, row, scales, out);            \
        break;

TARGET static void
unpack(const Weight *weight, int64_t row, const float *scales, void *out)
{
    switch (weight->dtype) {
        UNPACK(BF16)
        UNPACK(FP16)
        UNPACK(FP32)
    }
}
