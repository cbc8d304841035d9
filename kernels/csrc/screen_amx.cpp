// The screen on AMX, a unit of recent x86 processors that multiplies tiles of bfloat16 and adds up in float32.
//
// A float32 is high + low + rest, high and low bfloat16, low at most 2^-8 and the rest at most 2^-17 of it. A score is summed up
// from low * high + high * high + high * low: three times the products, at more than ten times the rate.
//
// Nothing in here may be a symbol that the linker could share with code for all processors (search.h).
#include "screen.h"

#if defined(__linux__) && defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")
#endif
#include <immintrin.h>

namespace tokenzoo {
namespace amx {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t AHEAD = 2048;                   // floats: how far in front rows are fetched
constexpr int64_t CODE_BLOCK_FLOATS = 128 << 10;  // codes that stay in L2 while all rows pass over them

// Tiles 0 to 3 are sums, [row tile][panel]; 4 and 5 rows, 6 and 7 codes. All are 16 rows of 64 bytes.
void configure() {
  alignas(64) uint8_t setting[64] = {};
  setting[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    setting[16 + 2 * tile] = 64;
    setting[48 + tile] = 16;
  }
  _tile_loadconfig(setting);
}

// Two vectors of values as bfloat16: the high parts are stored, and what is left of the values returned.
inline void take_high(__m512& first, __m512& second, float* high) {
  const auto rounded = [](__m512 x) {
    const __m512i half_up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(half_up, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  };
  const __m512 upper1 = rounded(first), upper2 = rounded(second);
  _mm512_storeu_si512(high, (__m512i)_mm512_cvtne2ps_pbh(upper2, upper1));
  first = _mm512_sub_ps(first, upper1);
  second = _mm512_sub_ps(second, upper2);
}

inline void take_low(__m512 first, __m512 second, float* low) {
  _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

inline __m512 add_squares(__m512 first, __m512 second, __m512 sum) {
  return _mm512_fmadd_ps(first, first, _mm512_fmadd_ps(second, second, sum));
}

inline float norm_of(__m512 squares) {
  return _mm512_cvtss_f32(_mm512_sqrt_ps(_mm512_set1_ps(_mm512_reduce_add_ps(squares))));
}

// Scores of SCREEN_ROWS rows and two panels, [row tile][panel][row][code].
template <bool ROUGH>
inline void score(const float* rows, const float* panels, const float* bias, int64_t steps, float* scores) {
  const int64_t width = 2 * steps * SCREEN_TILE, row_width = ROUGH ? width / 2 : width;
  const auto load_rows = [&](int64_t at) {
    _tile_loadd(4, rows + at, 64);
    _tile_loadd(5, rows + row_width + at, 64);
  };
  const auto load_panels = [&](int64_t at) {
    _tile_loadd(6, panels + at, 64);
    _tile_loadd(7, panels + width + at, 64);
  };
  const auto multiply = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  _tile_loadd(0, bias, 0);
  _tile_loadd(1, bias + PANEL, 0);
  _tile_loadd(2, bias, 0);
  _tile_loadd(3, bias + PANEL, 0);
  for (int64_t high = 0; high < width; high += 2 * SCREEN_TILE) {
    const int64_t low = high + SCREEN_TILE;
    if constexpr (ROUGH) {
      load_rows(high / 2);
      load_panels(high);
      multiply();
      continue;
    }
    load_rows(low);
    load_panels(high);
    multiply();
    load_rows(high);
    multiply();
    load_panels(low);
    multiply();
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + SCREEN_TILE, 64);
  _tile_stored(2, scores + 2 * SCREEN_TILE, 64);
  _tile_stored(3, scores + 3 * SCREEN_TILE, 64);
}

// The state of a row is, for each lane of codes, the best score so far, the second best, and the panel of the best.
inline void meet(const float* scores, int64_t panel, float* state) {
  for (int64_t n = 0; n < SCREEN_ROWS; ++n, state += 3 * LANES) {
    const float* row = scores + n / PANEL * 2 * SCREEN_TILE + n % PANEL * LANES;
    const __m512 one = _mm512_load_ps(row), two = _mm512_load_ps(row + SCREEN_TILE);
    const __m512 best = _mm512_load_ps(state), top = _mm512_max_ps(one, two);
    const __m512 loser = _mm512_max_ps(_mm512_min_ps(one, two), _mm512_min_ps(best, top));
    const __m512i here = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(panel)), _mm512_cmp_ps_mask(two, one, _CMP_GT_OQ),
                                                static_cast<int>(panel) + 1);
    _mm512_store_ps(state, _mm512_max_ps(best, top));
    _mm512_store_ps(state + LANES, _mm512_max_ps(_mm512_load_ps(state + LANES), loser));
    _mm512_mask_store_epi32(state + 2 * LANES, _mm512_cmp_ps_mask(top, best, _CMP_GT_OQ), here);
  }
}

Lead lead(const float* state) {
  const __m512 best = _mm512_load_ps(state);
  const float top = _mm512_reduce_max_ps(best);
  const uint32_t leaders = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ);
  const int lane = leaders ? __builtin_ctz(leaders) : 0;
  const __m512 others = _mm512_mask_blend_ps(static_cast<__mmask16>(1 << lane), best, _mm512_load_ps(state + LANES));
  const float second = _mm512_reduce_max_ps(_mm512_max_ps(others, _mm512_load_ps(state + LANES)));
  return {top, second, reinterpret_cast<const int32_t*>(state + 2 * LANES)[lane] * static_cast<int32_t>(PANEL) + lane};
}

}  // namespace

bool available() {
  static const bool answer = [] {
    uint32_t a, b, c, d, features;
    if (!__builtin_cpu_supports("avx512f") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;                                   // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 1, &features, &b, &c, &d) || (features >> 5 & 1) == 0) return false;  // AVX512-BF16
    constexpr long request = 0x1023, tile_data = 18;                                              // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return answer;
}

float pack_panel(const float* panel, int64_t dim, float* tiles) {
  // A tile's row holds two dims of PANEL codes, those of a code side by side.
  const __m512i low_half = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high_half = _mm512_add_epi32(low_half, _mm512_set1_epi32(8));
  __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t step = 0; step < screen_steps(dim); ++step, tiles += 2 * SCREEN_TILE)
    for (int64_t pair = 0; pair < SCREEN_STEP / 2; ++pair) {
      const int64_t d = step * SCREEN_STEP + 2 * pair;
      const __m512 even = d < dim ? _mm512_loadu_ps(panel + d * PANEL) : _mm512_setzero_ps();
      const __m512 odd = d + 1 < dim ? _mm512_loadu_ps(panel + (d + 1) * PANEL) : _mm512_setzero_ps();
      __m512 first = _mm512_permutex2var_ps(even, low_half, odd), second = _mm512_permutex2var_ps(even, high_half, odd);
      take_high(first, second, tiles + pair * LANES);
      take_low(first, second, tiles + SCREEN_TILE + pair * LANES);
      squares[0] = _mm512_fmadd_ps(first, first, squares[0]);
      squares[1] = _mm512_fmadd_ps(second, second, squares[1]);
    }
  // Two lanes side by side are of one code.
  const auto of_codes = [](__m512 v) { return _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1)); };
  return _mm512_cvtss_f32(_mm512_sqrt_ps(_mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(of_codes(squares[0]), of_codes(squares[1]))))));
}

void pack_rows(const float* x, int64_t count, int64_t dim, const float* mean, bool rough, float* tiles, float* norms, float* rests) {
  const int64_t steps = screen_steps(dim), padded = (count + SCREEN_ROWS - 1) / SCREEN_ROWS * SCREEN_ROWS;
  for (int64_t n = 0; n < padded; ++n) {
    float* to = tiles + n / PANEL * screen_floats(dim, rough) + n % PANEL * LANES;
    __m512 squares = _mm512_setzero_ps(), left_squares = squares;
    for (int64_t step = 0; step < steps; ++step, to += rough ? SCREEN_TILE : 2 * SCREEN_TILE) {
      const int64_t d = step * SCREEN_STEP, left = n < count ? dim - d : 0;
      const float* from = x + n * dim + d;
      __m512 first, second;
      if (left >= SCREEN_STEP) {
        _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(from + AHEAD + LANES), _MM_HINT_T0);
        first = _mm512_sub_ps(_mm512_loadu_ps(from), _mm512_loadu_ps(mean + d));
        second = _mm512_sub_ps(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(mean + d + LANES));
      } else {
        const auto some = [&](int64_t skip) {
          const int64_t here = left < skip ? 0 : left - skip < LANES ? left - skip : LANES;
          const __mmask16 mask = static_cast<__mmask16>((1u << here) - 1);
          return _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, from + skip), _mm512_maskz_loadu_ps(mask, mean + d + skip));
        };
        first = some(0);
        second = some(LANES);
      }
      squares = add_squares(first, second, squares);
      take_high(first, second, to);
      left_squares = add_squares(first, second, left_squares);
      if (!rough) take_low(first, second, to + SCREEN_TILE);
    }
    norms[n] = norm_of(squares);
    rests[n] = norm_of(left_squares);
  }
}

void scan(const float* rows, int64_t count, int64_t dim, bool rough, const float* panels, const float* bias, int64_t first,
          int64_t last, float* scratch, Lead* leads) {
  alignas(64) float scores[2][4 * SCREEN_TILE];  // two, so that a pair of panels is scored while the last is looked at
  const int64_t steps = screen_steps(dim), width = screen_floats(dim), row_width = screen_floats(dim, rough);
  const int64_t block = CODE_BLOCK_FLOATS / (2 * width) * 2 > 2 ? CODE_BLOCK_FLOATS / (2 * width) * 2 : 2;
  for (int64_t n = 0; n < count; ++n) {
    _mm512_store_ps(scratch + n * 3 * LANES, _mm512_set1_ps(-__builtin_inff()));
    _mm512_store_ps(scratch + n * 3 * LANES + LANES, _mm512_set1_ps(-__builtin_inff()));
    _mm512_store_si512(scratch + n * 3 * LANES + 2 * LANES, _mm512_set1_epi32(static_cast<int>(first)));
  }
  configure();
  for (int64_t start = first; start < last; start += block) {
    const int64_t end = start + block < last ? start + block : last;
    for (int64_t n = 0; n < count; n += SCREEN_ROWS)
      for (int64_t panel = start; panel < end; panel += 2) {
        float* found = scores[panel / 2 % 2];
        const auto scored = rough ? score<true> : score<false>;
        scored(rows + n / PANEL * row_width, panels + panel * width, bias + panel * PANEL, steps, found);
        meet(found, panel, scratch + n * 3 * LANES);
      }
  }
  _tile_release();
  for (int64_t n = 0; n < count; ++n) leads[n] = lead(scratch + n * 3 * LANES);
}

}  // namespace amx
}  // namespace tokenzoo

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace tokenzoo {
namespace amx {

bool available() { return false; }
float pack_panel(const float*, int64_t, float*) { return 0; }
void pack_rows(const float*, int64_t, int64_t, const float*, bool, float*, float*, float*) {}
void scan(const float*, int64_t, int64_t, bool, const float*, const float*, int64_t, int64_t, float*, Lead*) {}

}  // namespace amx
}  // namespace tokenzoo
#endif
