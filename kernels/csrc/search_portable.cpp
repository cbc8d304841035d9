// Any other processor: the compiler's own vectors of four floats (SSE2, NEON, VSX, ...).
#include <cstdint>

#define ISA portable
#define LANES 4
#define ROW_VECTORS 2
#define GROUP 4
#define FEW 4

typedef float Vec4 __attribute__((vector_size(16)));
static inline Vec4 vmax(Vec4 a, Vec4 b) { return a > b ? a : b; }
static inline uint32_t lanes_equal(Vec4 a, Vec4 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a[i] == b[i]) << i;
  return bits;
}
static inline uint32_t lanes_above(Vec4 a, Vec4 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return bits;
}
// Values that lie `stride` apart.
static inline Vec4 strided(const float* p, int64_t stride) { return Vec4{p[0], p[stride], p[2 * stride], p[3 * stride]}; }

#include "search.h"
