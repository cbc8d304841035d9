// AVX-512: 48 rows by 8 codes in 24 of the 32 registers.
#include <immintrin.h>

#include <cstdint>

#define ISA avx512
#define LANES 16
#define ROW_VECTORS 3
#define GROUP 8
#define FEW 16

static inline __m512 vmax(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
static inline uint32_t lanes_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline uint32_t lanes_above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// Values that lie `stride` apart.
static inline __m512 strided(const float* p, int64_t stride) {
  const auto four = [&](int64_t i) { return _mm_setr_ps(p[i * stride], p[(i + 1) * stride], p[(i + 2) * stride], p[(i + 3) * stride]); };
  const __m256 low = _mm256_set_m128(four(4), four(0)), high = _mm256_set_m128(four(12), four(8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

#include "search.h"
