// AVX2 with FMA: 24 rows by 4 codes in 12 of the 16 registers.
#include <immintrin.h>

#include <cstdint>

#define ISA avx2
#define LANES 8
#define ROW_VECTORS 3
#define GROUP 4
#define FEW 4

static inline __m256 vmax(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
static inline uint32_t lanes_equal(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
static inline uint32_t lanes_above(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
// Values that lie `stride` apart.
static inline __m256 strided(const float* p, int64_t stride) {
  const auto four = [&](int64_t i) { return _mm_setr_ps(p[i * stride], p[(i + 1) * stride], p[(i + 2) * stride], p[(i + 3) * stride]); };
  return _mm256_set_m128(four(4), four(0));
}

#include "search.h"
