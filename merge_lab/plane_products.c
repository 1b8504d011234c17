// Products of a few inputs with a weight that is held as planes of bits: it is read as it lies, and nothing is written down of it.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define MOST_INPUTS 16

static float to_float(const void *values, int64_t place, int half) {  // half: bfloat16, else float
    if (!half) return ((const float *)values)[place];
    uint32_t bits = (uint32_t)((const uint16_t *)values)[place] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void from_float(float value, void *values, int64_t place, int half) {  // to the nearest, ties to even
    if (!half) {
        ((float *)values)[place] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    int number = value == value;
    ((uint16_t *)values)[place] = number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// Adds the products of 8 columns, whose bits are in one byte of each plane; the last column is the byte's lowest bit.
static inline void add_eight(const uint8_t *plane, int64_t stride, int bits, const float *table, const float *x, int64_t padded, int inputs, float *sums) {
    uint64_t codes = 0;  // a byte for each column, the first one lowest
    for (int k = 0; k < bits; k++) codes = codes << 1 | (plane[k * stride] * 0x8040201008040201ULL >> 7 & 0x0101010101010101ULL);
    float values[8];
    for (int j = 0; j < 8; j++) values[j] = table[codes >> (56 - 8 * j) & 255];
    for (int t = 0; t < inputs; t++)
        for (int j = 0; j < 8; j++) sums[8 * t + j] += values[j] * x[t * padded + j];
}

// Sums of a row over its blocks, eight columns at a time.
static void add_bytes(int bits, const uint8_t *row, int64_t stride, const float *table, const uint8_t *shares, float row_scale, int64_t blocks, int64_t size, const float *x, int64_t padded, int inputs, float *total) {
    for (int t = 0; t < inputs; t++) total[t] = 0;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t stop = (b + 1) * size < padded ? (b + 1) * size : padded;
        float scale = row_scale * (float)(shares[b] + 1), eight[8 * MOST_INPUTS] = {0};
        for (int64_t c = b * size; c < stop; c += 8) add_eight(row + c / 8, stride, bits, table, x + c, padded, inputs, eight);
        for (int t = 0; t < inputs; t++)
            for (int j = 0; j < 8; j++) total[t] += scale * eight[8 * t + j];
    }
}

#ifdef __AVX512BW__
struct tables {
    __m512 floats[16];   // values
    __m512i bytes[2][4]; // the low and the high bytes of the shares
};

static inline __m512 look_up(__m512i code, const __m512 *table, int bits) {
    if (bits <= 4) return _mm512_permutexvar_ps(code, table[0]);
    __m512 found[8];
    int count = 1 << (bits - 5);
    for (int k = 0; k < count; k++) found[k] = _mm512_permutex2var_ps(table[2 * k], code, table[2 * k + 1]);
    for (int bit = 32; count > 1; bit *= 2) {
        __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(bit));
        count /= 2;
        for (int k = 0; k < count; k++) found[k] = _mm512_mask_blend_ps(upper, found[2 * k], found[2 * k + 1]);
    }
    return found[0];
}

#ifdef __AVX512VBMI__
// One byte of each of 64 values, from a table of bytes.
static inline __m512i look_up_bytes(__m512i code, const __m512i *table, int bits) {
    if (bits <= 6) return _mm512_permutexvar_epi8(code, table[0]);
    __m512i low = _mm512_permutex2var_epi8(table[0], code, table[1]);
    if (bits == 7) return low;
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, _mm512_permutex2var_epi8(table[2], code, table[3]));
}

// Shares out of byte k of each of 16 words of low and high bytes.
static inline __m512 as_floats(__m512i low, __m512i high, int k) {
    high = _mm512_srai_epi32(_mm512_slli_epi32(high, (unsigned)(24 - 8 * k)), 16);
    low = _mm512_and_si512(_mm512_srli_epi32(low, (unsigned)(8 * k)), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_or_si512(_mm512_andnot_si512(_mm512_set1_epi32(255), high), low));
}
#endif

// Values of 64 columns: those of byte k of each word of codes are in w[k].
static inline __attribute__((always_inline)) void values_of(int bits, __m512i code, const struct tables *tables, __m512 *w) {
#ifdef __AVX512VBMI__
    if (bits > 5) {
        __m512i low = look_up_bytes(code, tables->bytes[0], bits), high = look_up_bytes(code, tables->bytes[1], bits);
        for (int k = 0; k < 4; k++) w[k] = as_floats(low, high, k);
        return;
    }
#endif
    for (int k = 0; k < 4; k++) w[k] = look_up(_mm512_srli_epi32(code, (unsigned)(8 * k)), tables->floats, bits);  // bits above those of the table are passed over
}

// Adds a block of 64 columns to the sums of each input.
static inline __attribute__((always_inline)) void add_block(
    int bits, const uint8_t *plane, int64_t stride, const struct tables *tables, float scale, const float *x, int64_t padded, int inputs, __m512 *sums) {
    __m512i code = _mm512_setzero_si512();
    for (int k = 0; k < bits; k++) {
        uint64_t one;
        memcpy(&one, plane + k * stride, 8);
        code = _mm512_mask_add_epi8(code, one, code, _mm512_set1_epi8((char)(1 << (bits - 1 - k))));
    }
    __m512 w[4];
    values_of(bits, code, tables, w);
    for (int t = 0; t < inputs; t++) {
        const float *own = x + t * padded;
        __m512 one = _mm512_mul_ps(w[0], _mm512_loadu_ps(own)), other = _mm512_mul_ps(w[1], _mm512_loadu_ps(own + 16));
        one = _mm512_fmadd_ps(w[2], _mm512_loadu_ps(own + 32), one);
        other = _mm512_fmadd_ps(w[3], _mm512_loadu_ps(own + 48), other);
        sums[t] = _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_add_ps(one, other), sums[t]);
    }
}

// Sums of a row over its blocks of 64 columns.
static inline __attribute__((always_inline)) void add_row_of(
    int bits, const uint8_t *row, int64_t stride, const struct tables *tables, const uint8_t *shares, float row_scale, int64_t blocks, const float *x, int64_t padded, int inputs, float *total) {
    __m512 sums[MOST_INPUTS];
    for (int t = 0; t < inputs; t++) sums[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) add_block(bits, row + 8 * b, stride, tables, row_scale * (float)(shares[b] + 1), x + 64 * b, padded, inputs, sums);
    for (int t = 0; t < inputs; t++) total[t] = _mm512_reduce_add_ps(sums[t]);
}

#define FOR_BITS(n) case n: if (inputs == 1) add_row_of(n, row, stride, tables, shares, row_scale, blocks, x, padded, 1, total); else add_row_of(n, row, stride, tables, shares, row_scale, blocks, x, padded, inputs, total); return;

static void add_row(int bits, const uint8_t *row, int64_t stride, const struct tables *tables, const uint8_t *shares, float row_scale, int64_t blocks, const float *x, int64_t padded, int inputs, float *total) {
    switch (bits) { FOR_BITS(1) FOR_BITS(2) FOR_BITS(3) FOR_BITS(4) FOR_BITS(5) FOR_BITS(6) FOR_BITS(7) FOR_BITS(8) }
}
#endif

struct weight {
    const int16_t *table;       // (2**bits,) shares of the scale
    const uint8_t *planes;      // (planes, rows, bytes)
    const void *row_scale;      // (rows,)
    const uint8_t *block_scale; // (rows, blocks)
    const void *kept;           // (rows, kept columns), or none
    const int32_t *kept_columns;
    int64_t rows, columns, blocks, kept_count, bits, half;
};

// Where a column's input lies: each eight back to front, as their bits are; of 64 columns at once, by bytes of words.
static int64_t place_of(int64_t column, int words) {
    int64_t turned = (column | 7) - (column & 7);
    return words ? (turned & ~63) + 16 * (turned & 3) + (turned & 63) / 4 : turned;
}

// y (inputs, rows) = x (inputs, columns) times the weight; sums in float. Returns 0, 1 where memory is short, or 2 where a kept column is none.
int plane_product(const struct weight *w, const void *x, void *y, int64_t inputs, int64_t threads) {
    int64_t size = (w->columns + w->blocks - 1) / w->blocks, bytes = (w->columns + 7) / 8, stride = w->rows * bytes, padded = bytes * 8;
    int half = (int)w->half, bits = (int)w->bits;
    for (int64_t k = 0; k < w->kept_count; k++)
        if (w->kept_columns[k] < 0 || w->kept_columns[k] >= w->columns) return 2;
    float *turned = calloc((size_t)(inputs * padded), sizeof(float));
    int words = 0;
#ifdef __AVX512BW__
    words = size == 64 && padded == 64 * w->blocks;
#endif
    if (!turned || inputs > MOST_INPUTS) return free(turned), 1;
    for (int64_t t = 0; t < inputs; t++)
        for (int64_t c = 0; c < w->columns; c++) turned[t * padded + place_of(c, words)] = to_float(x, t * w->columns + c, half);
    for (int64_t t = 0; t < inputs; t++)
        for (int64_t k = 0; k < w->kept_count; k++) turned[t * padded + place_of(w->kept_columns[k], words)] = 0;
    float table[256] = {0};
    for (int k = 0; k < 1 << bits; k++) table[k] = w->table[k];
#ifdef __AVX512BW__
    struct tables tables;
    uint8_t parts[2][256] = {{0}};
    for (int k = 0; k < 1 << bits; k++) parts[0][k] = (uint8_t)w->table[k], parts[1][k] = (uint8_t)(w->table[k] >> 8);
    memcpy(tables.floats, table, sizeof tables.floats);
    memcpy(tables.bytes, parts, sizeof tables.bytes);
#endif
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < w->rows; r++) {
        const uint8_t *row = w->planes + r * bytes, *shares = w->block_scale + r * w->blocks;
        float row_scale = to_float(w->row_scale, r, half) / (256 * 32767.0f), total[MOST_INPUTS];
#ifdef __AVX512BW__
        if (words)
            add_row(bits, row, stride, &tables, shares, row_scale, w->blocks, turned, padded, (int)inputs, total);
        else
#endif
            add_bytes(bits, row, stride, table, shares, row_scale, w->blocks, size, turned, padded, (int)inputs, total);
        for (int64_t t = 0; t < inputs; t++) {
            for (int64_t k = 0; k < w->kept_count; k++)
                total[t] += to_float(w->kept, r * w->kept_count + k, half) * to_float(x, t * w->columns + w->kept_columns[k], half);
            from_float(total[t], y, t * w->rows + r, half);
        }
    }
    free(turned);
    return 0;
}
