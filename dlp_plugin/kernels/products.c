/* The entry points of the library. Rows are divided among threads. One thread sums a row, always in
   the same order, so that the bits of a product do not depend on the number of threads. */
#include <stdlib.h>

#include "kernels.h"

#define EXPORT __attribute__((visibility("default")))
#define CHUNK 256 /* largest number of rows that a thread takes at a time */

/* GOMP_parallel of the OpenMP that torch uses, to share its threads. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    const Weight *weight;
    const Kernels *kernels;
    int64_t first, last; /* rows of the weight */
    const void *x;       /* float32 in the kernels' order, or bfloat16 if pairs */
    int pairs;           /* whether bfloat16 is multiplied by bfloat16 */
    int64_t block;       /* number of rows of x that are interleaved by words */
    int64_t count;       /* rows of x; 0: expand rows of the weight instead of multiplying */
    const float *bias;   /* or NULL */
    void *out;
    int dtype;           /* of out */
    int64_t chunk;       /* rows that a thread takes at a time, a multiple of four */
    int64_t next;        /* first row that no thread has taken yet */
    int failed;
} Job;

/* The buffers of one thread. */
typedef struct {
    void *values[4]; /* unpacked rows of integers */
    float *scales;
    float *rows; /* four expanded rows */
    float *products;
} Scratch;

static const Kernels *
kernels_of(int which)
{
#if defined(__x86_64__)
    if (which == 3)
        return &avx512bf16_kernels;
    if (which == 2)
        return &avx512_kernels;
    if (which == 1)
        return &avx2_kernels;
#endif
    (void)which;
    return &portable_kernels;
}

/* The number, as in kernels_of, of the best kernels that the processor can run. */
EXPORT int
dlp_best(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi2");
    if (two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (two)
        return 1;
#endif
    return 0;
}

/* Returns a row's values; integers are unpacked into a buffer first. */
static const void *
values_of(const Kernels *kernels, const Weight *weight, int64_t row, Scratch *scratch, int buffer)
{
    int size = size_of(weight->dtype);
    if (!weight->bits)
        return weight->packed + start_of(weight, row) * size;
    const uint8_t *scales = (const uint8_t *)weight->scale + row * weight->groups * size;
    kernels->widen(weight->dtype, scales, weight->groups, scratch->scales);
    kernels->unpack(weight, row, scratch->scales, scratch->values[buffer]);
    return scratch->values[buffer];
}

/* Adds the bias to sums[rows of x][stride], and writes them as columns first, first + 1, ... of
   out. */
static void
finish(Job *job, const Kernels *kernels, float *sums, int64_t stride, int64_t first, int64_t rows)
{
    for (int64_t i = 0; i < job->count; i++, sums += stride) {
        for (int64_t row = 0; job->bias && row < rows; row++)
            sums[row] += job->bias[first + row];
        int64_t place = i * job->weight->rows + first;
        kernels->narrow(job->dtype, sums, rows, (uint8_t *)job->out + place * size_of(job->dtype));
    }
}

/* For few rows of x: expands values in registers, for four or two rows of the weight at a time.
   Each of these goes through its own run of consecutive rows, so that software prefetch reaches
   into the row that comes next. */
static void
register_chunk(Job *job, Scratch *scratch, int64_t first, int64_t last)
{
    const Weight *weight = job->weight;
    const Kernels *kernels = job->kernels;
    int64_t beside = job->pairs && job->count == 1 ? 2 : 4;
    int64_t run = (last - first + beside - 1) / beside, columns = 64 * weight->words;
    for (int64_t row = first; row < first + run; row++) {
        int64_t rows[4];
        const uint64_t *mask[4];
        const void *values[4];
        for (int i = 0; i < beside; i++) {
            rows[i] = least(row + i * run, last - 1);
            mask[i] = mask_of(weight, rows[i]);
            values[i] = values_of(kernels, weight, rows[i], scratch, i);
        }
        for (int64_t done = 0, count; done < job->count; done += count) {
            float found[4 * SOME];
            count = least(job->block, job->count - done);
            if (beside == 2)
                kernels->pair_dot(mask, values, weight->words, job->x, found);
            else if (job->pairs)
                kernels->pair_dots(mask, values, weight->words,
                                   (const uint16_t *)job->x + done * columns, count, found);
            else
                kernels->dots(weight->dtype, mask, values, weight->words,
                              (const float *)job->x + done * columns, count, found);
            for (int64_t i = 0; i < beside * count; i++) {
                int64_t row_of_x = done + i / beside;
                scratch->products[row_of_x * CHUNK + rows[i % beside] - first] = found[i];
            }
        }
    }
    finish(job, kernels, scratch->products, CHUNK, first, last - first);
}

/* For more rows of x: expands four rows of the weight at a time, and uses them for all of x. */
static void
matrix_chunk(Job *job, Scratch *scratch, int64_t first, int64_t last)
{
    const Weight *weight = job->weight;
    const Kernels *kernels = job->kernels;
    int64_t columns = 64 * weight->words;
    for (int64_t row = first; row < last; row += 4) {
        int64_t rows = least(4, last - row);
        for (int64_t i = 0; i < rows; i++) {
            const uint64_t *mask = mask_of(weight, row + i);
            const void *values = values_of(kernels, weight, row + i, scratch, 0);
            if (job->pairs)
                kernels->dense(BF16, mask, values, weight->words,
                               (uint16_t *)scratch->rows + i * columns);
            else
                kernels->expand(weight->dtype, mask, values, weight->words,
                                scratch->rows + i * columns);
        }
        if (job->pairs)
            kernels->pair_tile((uint16_t *)scratch->rows, job->x, job->count, weight->words,
                               scratch->products);
        else
            kernels->tile(scratch->rows, job->x, job->count, weight->words, scratch->products);
        finish(job, kernels, scratch->products, 4, row, rows);
    }
}

/* Writes rows of the weight with their zeros. */
static void
dense_chunk(Job *job, Scratch *scratch, int64_t first, int64_t last)
{
    const Weight *weight = job->weight;
    const Kernels *kernels = job->kernels;
    for (int64_t row = first; row < last; row++) {
        const void *values = values_of(kernels, weight, row, scratch, 0);
        uint8_t *out = (uint8_t *)job->out +
                       (row - job->first) * weight->columns * size_of(job->dtype);
        if (job->dtype == weight->dtype && weight->columns % 64 == 0) {
            kernels->dense(weight->dtype, mask_of(weight, row), values, weight->words, out);
            continue;
        }
        kernels->dense(weight->dtype, mask_of(weight, row), values, weight->words, scratch->rows);
        if (job->dtype == weight->dtype)
            memcpy(out, scratch->rows, (size_t)(weight->columns * size_of(job->dtype)));
        else
            kernels->widen(weight->dtype, scratch->rows, weight->columns, (float *)out);
    }
}

/* Allocates zeros, aligned to a cache line. */
static void *
room_for(int64_t entries, int64_t size)
{
    size_t bytes = ((size_t)(entries + SPARE) * (size_t)size + 63) / 64 * 64;
    void *room = aligned_alloc(64, bytes);
    return room ? memset(room, 0, bytes) : NULL;
}

static void
work(void *data)
{
    Job *job = data;
    int64_t columns = 64 * job->weight->words, unpacked = job->weight->bits ? columns : 0;
    int64_t rows = job->block > 1 ? 0 : 4, products = job->block > 1 ? CHUNK : 4;
    int64_t entries[] = {unpacked, unpacked, unpacked, unpacked, job->weight->groups,
                         rows * columns, products * job->count};
    float *parts[7];
    int64_t total = 0;
    for (int i = 0; i < 7; i++)
        total += entries[i] + SPARE;
    float *room = room_for(total, 4);
    if (!room) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    parts[0] = room;
    for (int i = 0; i < 6; i++)
        parts[i + 1] = parts[i] + entries[i] + SPARE;
    Scratch scratch = {{parts[0], parts[1], parts[2], parts[3]}, parts[4], parts[5], parts[6]};
    for (;;) {
        int64_t first = __atomic_fetch_add(&job->next, job->chunk, __ATOMIC_RELAXED);
        int64_t last = least(first + job->chunk, job->last);
        if (first >= last)
            break;
        if (job->count == 0)
            dense_chunk(job, &scratch, first, last);
        else if (job->block > 1)
            register_chunk(job, &scratch, first, last);
        else
            matrix_chunk(job, &scratch, first, last);
    }
    free(room);
}

static int
run(Job *job, int threads, Parallel parallel)
{
    int64_t rows = job->last - job->first;
    job->next = job->first;
    job->chunk = least(CHUNK, (rows / (4 * (int64_t)threads) + 4) / 4 * 4);
    threads = (int)least(threads, (rows + job->chunk - 1) / job->chunk);
    if (parallel && threads > 1)
        parallel(work, job, (unsigned)threads, 0);
    else
        work(job);
    return job->failed;
}

/* Computes out[count][rows] = x[count][columns] W^T + bias, in x's dtype. Returns 0, or 1 if there
   is not enough memory. */
EXPORT int
dlp_multiply(const Weight *weight, int which, const void *x, int64_t count, int dtype,
             const float *bias, void *out, int threads, Parallel parallel)
{
    const Kernels *kernels = kernels_of(which);
    int64_t columns = 64 * weight->words;
    int pairs = kernels->pair_dot && dtype == BF16 && weight->dtype == BF16;
    int64_t block = count <= (pairs ? 4 * SOME : FEW) ? (pairs ? SOME : FEW) : 1;
    int64_t size = pairs ? 2 : 4;
    uint8_t *ordered = room_for((count + 1) * columns, size);
    if (!count || !ordered) {
        free(ordered);
        return count != 0;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t bytes = weight->columns * size_of(dtype), first = i - i % block;
        int64_t beside = least(block, count - first);
        const uint8_t *from = (const uint8_t *)x + i * bytes;
        uint8_t *to = ordered + first * columns * size;
        uint8_t *row = beside > 1 ? ordered + count * columns * size : to;
        if (pairs) {
            memcpy(row, from, (size_t)bytes);
        } else {
            /* The reordered row before has left values in the padding. */
            memset((float *)row + weight->columns, 0, (size_t)(columns - weight->columns) * 4);
            kernels->widen(dtype, from, weight->columns, (float *)row);
            kernels->order(weight->dtype, (float *)row, weight->words);
        }
        for (int64_t word = 0; beside > 1 && word < weight->words; word++)
            memcpy(to + 64 * size * (word * beside + i - first), row + 64 * size * word,
                   (size_t)(64 * size));
    }
    Job job = {.weight = weight, .kernels = kernels, .last = weight->rows, .x = ordered,
               .pairs = pairs, .block = block, .count = count, .bias = bias, .out = out,
               .dtype = dtype};
    int failed = run(&job, threads, parallel);
    free(ordered);
    return failed;
}

/* Writes rows with their zeros to out[last - first][columns], in the weight's dtype or float32.
   Returns 0, or 1 if there is not enough memory. */
EXPORT int
dlp_expand(const Weight *weight, int which, int64_t first, int64_t last, int dtype, void *out,
           int threads, Parallel parallel)
{
    Job job = {.weight = weight, .kernels = kernels_of(which), .first = first, .last = last,
               .out = out, .dtype = dtype};
    return run(&job, threads, parallel);
}

/* Identifies the sources that the library was built from. */
#ifndef DLP_DIGEST
#define DLP_DIGEST ""
#endif
EXPORT const char *
dlp_digest(void)
{
    return DLP_DIGEST;
}
