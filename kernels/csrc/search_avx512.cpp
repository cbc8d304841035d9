// AVX-512: 32 rows by 8 codes in 16 of the 32 registers.
#include <immintrin.h>

#include <cstdint>

#define ISA avx512
#define LANES 16
#define ROW_VECTORS 2
#define GROUP 8
#define FEW 8

static inline __m512 vmax(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
static inline uint32_t lanes_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline uint32_t lanes_above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

#include "search.h"
