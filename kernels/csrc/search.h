// Nearest codebook entry: the part that is compiled once per instruction set.
//
// The including file defines ISA (a namespace), LANES (floats in a register), ROW_VECTORS and GROUP (a tile is
// ROW_VECTORS * LANES rows, scored against GROUP codes at a time; the accumulators must stay in registers) and vmax.
//
// An entry's score is x.c - |c|^2 / 2, largest where the distance is smallest; |x|^2 is never needed. Rows lie in lanes and
// codes are broadcast, so the running maximum costs one instruction a score and no index is tracked in the hot loop: only,
// once per panel of codes, which panel holds each row's maximum so far. That panel's scores are computed again with codes
// in lanes, and the first of the largest is the answer. Nothing of size rows x codes is ever written.
//
// This file is compiled for instruction sets that the processor may lack, so nothing in it may be a symbol that the linker
// could share with code for all processors: everything is in an anonymous namespace, and no standard template is used.
//
// Layouts: a tile of rows is packed [dim][ROWS]; codes are [panel][dim][PANEL], padded with entries whose bias is -inf.
#pragma once

#include <cstdint>

#include "search_table.h"

namespace tokenzoo {
namespace ISA {
namespace {

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef int32_t IntsUnaligned __attribute__((vector_size(LANES * 4), aligned(4)));

constexpr int ROWS = LANES * ROW_VECTORS;
constexpr int PARTS = PANEL / LANES;
constexpr float LOWEST = -__builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const IntsUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<IntsUnaligned*>(p) = v; }
inline Vec splat(float value) { return value - Vec{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }

// Scores of a tile against GROUP codes, reduced into the running maximum of each row. DIM is dim where it is known.
template <int DIM>
inline void scan_group(const float* tile, const float* codes, const float* bias, int64_t dim, Vec (&top)[ROW_VECTORS]) {
  Vec sums[ROW_VECTORS][GROUP];
#pragma GCC unroll 16
  for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) sums[r][j] = splat(bias[j]);
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    Vec rows[ROW_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) rows[r] = load(tile + d * ROWS + r * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < GROUP; ++j) {
      const Vec code = splat(codes[d * PANEL + j]);
#pragma GCC unroll 4
      for (int r = 0; r < ROW_VECTORS; ++r) sums[r][j] = rows[r] * code + sums[r][j];
    }
  };
  if constexpr (DIM > 0) {
#pragma GCC unroll 16
    for (int64_t d = 0; d < DIM; ++d) step(d);
  } else {
    for (int64_t d = 0; d < dim; ++d) step(d);
  }
#pragma GCC unroll 16
  for (int j = 0; j < GROUP / 2; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) top[r] = vmax(vmax(sums[r][j], sums[r][j + GROUP / 2]), top[r]);
}

template <int DIM>
void scan_width(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
                int32_t* where) {
  Vec highest[ROW_VECTORS];
  Ints found[ROW_VECTORS];
  for (int r = 0; r < ROW_VECTORS; ++r) {
    highest[r] = load(best + r * LANES);
    found[r] = load(where + r * LANES);
  }
  for (int64_t panel = first; panel < last; ++panel) {
    Vec top[ROW_VECTORS];
    for (int r = 0; r < ROW_VECTORS; ++r) top[r] = splat(LOWEST);
    for (int g = 0; g < PANEL; g += GROUP)
      scan_group<DIM>(tile, panels + panel * dim * PANEL + g, bias + panel * PANEL + g, dim, top);
    for (int r = 0; r < ROW_VECTORS; ++r) {
      const Ints better = top[r] > highest[r];
      highest[r] = vmax(top[r], highest[r]);
      found[r] = better ? splat(static_cast<int32_t>(panel)) : found[r];
    }
  }
  for (int r = 0; r < ROW_VECTORS; ++r) {
    store(best + r * LANES, highest[r]);
    store(where + r * LANES, found[r]);
  }
}

void scan(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
          int32_t* where) {
  switch (dim) {
    case 4: return scan_width<4>(tile, panels, bias, dim, first, last, best, where);
    case 8: return scan_width<8>(tile, panels, bias, dim, first, last, best, where);
    case 12: return scan_width<12>(tile, panels, bias, dim, first, last, best, where);
    case 16: return scan_width<16>(tile, panels, bias, dim, first, last, best, where);
    default: return scan_width<0>(tile, panels, bias, dim, first, last, best, where);
  }
}

int32_t resolve(const float* row, int64_t stride, const float* panel, const float* bias, int64_t dim, float score) {
  Vec sums[PARTS];
#pragma GCC unroll 8
  for (int p = 0; p < PARTS; ++p) sums[p] = load(bias + p * LANES);
  for (int64_t d = 0; d < dim; ++d) {
    const Vec value = splat(row[d * stride]);
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; ++p) sums[p] = value * load(panel + d * PANEL + p * LANES) + sums[p];
  }
  for (int p = 0; p < PARTS; ++p)
    if (const uint32_t equal = lanes_equal(sums[p], splat(score))) return p * LANES + __builtin_ctz(equal);
  // A compiler that contracts the two loops differently leaves no score bit-equal; the largest is then the answer.
  int32_t best = 0;
  for (int32_t i = 1; i < PANEL; ++i)
    if (sums[i / LANES][i % LANES] > sums[best / LANES][best % LANES]) best = i;
  return best;
}

// COUNT rows against WIDTH panels at a time, codes in lanes: for so few rows that a tile would be mostly empty.
template <int COUNT, int WIDTH>
inline void few_step(const float* rows, const float* panels, const float* bias, int64_t dim, int64_t panel,
                     Vec (&best)[COUNT][PARTS], Ints (&where)[COUNT][PARTS]) {
  Vec sums[COUNT][WIDTH][PARTS];
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; ++w)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) sums[n][w][p] = load(bias + (panel + w) * PANEL + p * LANES);
  const float* codes = panels + panel * dim * PANEL;
  for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; ++w)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) {
        const Vec code = load(codes + (w * dim + d) * PANEL + p * LANES);
#pragma GCC unroll 16
        for (int n = 0; n < COUNT; ++n) sums[n][w][p] = splat(rows[n * dim + d]) * code + sums[n][w][p];
      }
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n)
#pragma GCC unroll 8
    for (int w = 0; w < WIDTH; ++w)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) {
        const Ints better = sums[n][w][p] > best[n][p];
        best[n][p] = better ? sums[n][w][p] : best[n][p];
        where[n][p] = better ? splat(static_cast<int32_t>(panel + w)) : where[n][p];
      }
}

template <int COUNT, int WIDTH>
void few_rows(const float* rows, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
              int32_t* code) {
  Vec highest[COUNT][PARTS];
  Ints where[COUNT][PARTS];
  for (int n = 0; n < COUNT; ++n)
    for (int p = 0; p < PARTS; ++p) {
      highest[n][p] = splat(LOWEST);
      where[n][p] = splat(static_cast<int32_t>(first));
    }
  int64_t panel = first;
  for (; panel + WIDTH <= last; panel += WIDTH) few_step<COUNT, WIDTH>(rows, panels, bias, dim, panel, highest, where);
  for (; panel < last; ++panel) few_step<COUNT, 1>(rows, panels, bias, dim, panel, highest, where);
  for (int n = 0; n < COUNT; ++n) {
    best[n] = LOWEST;
    code[n] = static_cast<int32_t>(first) * PANEL;
    for (int i = 0; i < PANEL; ++i) {
      const float score = highest[n][i / LANES][i % LANES];
      const int32_t candidate = where[n][i / LANES][i % LANES] * PANEL + i;
      if (score > best[n] || (score == best[n] && candidate < code[n])) {
        best[n] = score;
        code[n] = candidate;
      }
    }
  }
}

void scan_few(const float* rows, int64_t count, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last,
              float* best, int32_t* code) {
  // Accumulators: COUNT * WIDTH * PARTS, enough to hide the latency of a multiply-add and few enough for the registers.
  int64_t n = 0;
  if constexpr (FEW >= 8)
    for (; n + 8 <= count; n += 8) few_rows<8, 1>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
  for (; n + 4 <= count; n += 4) few_rows<4, FEW / 4>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
  for (; n + 2 <= count; n += 2) few_rows<2, FEW / 2>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
  for (; n < count; ++n) few_rows<1, FEW>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
}

// LANES rows are dim vectors, whose lanes repeat the dimensions in turn: the tables come spread out to match, each of
// span = dim * LANES entries.
void fsq(const float* x, int64_t count, int64_t dim, const FsqTables& tables, float* scratch, int32_t* parts, float* codes,
         int64_t* ids) {
  const int64_t span = dim * LANES;
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t rows = count - first < LANES ? count - first : LANES;
    const bool whole = rows == LANES;
    const float* in = x + first * dim;
    float* to = codes + first * dim;
    if (!whole) {
      for (int64_t i = 0; i < rows * dim; ++i) scratch[i] = in[i];
      in = to = scratch;
    }
    for (int64_t i = 0; i < span; i += LANES) {
      const Vec value = load(in + i);
      Ints level = splat(0);
      for (int64_t t = 0; t < tables.num_thresholds; ++t) level -= value >= load(tables.thresholds + t * span + i);
      store(to + i, __builtin_convertvector(level, Vec) * load(tables.scale + i) + load(tables.shift + i));
      store(parts + i, level * load(tables.basis + i));
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t id = 0;
      for (int64_t d = 0; d < dim; ++d) id += parts[r * dim + d];
      ids[first + r] = id;
    }
    if (!whole)
      for (int64_t i = 0; i < rows * dim; ++i) codes[first * dim + i] = scratch[i];
  }
}

// Bit i of the word is value i of the row; ids have the first dimension highest, so the word is reversed.
inline uint64_t reversed(uint64_t word, int64_t bits) {
  word = __builtin_bswap64(word);
  word = (word >> 4 & 0x0f0f0f0f0f0f0f0f) | (word & 0x0f0f0f0f0f0f0f0f) << 4;
  word = (word >> 2 & 0x3333333333333333) | (word & 0x3333333333333333) << 2;
  word = (word >> 1 & 0x5555555555555555) | (word & 0x5555555555555555) << 1;
  return word >> (64 - bits);
}

void lfq(const float* x, int64_t count, int64_t dim, float high, float* codes, int64_t* ids) {
  const Vec zero = splat(0.f);
  const int64_t total = count * dim, padded_dim = (dim + LANES - 1) / LANES * LANES;
  int64_t i = 0;
  for (; i + LANES <= total; i += LANES) store(codes + i, load(x + i) > zero ? splat(high) : splat(-high));
  for (; i < total; ++i) codes[i] = x[i] > 0 ? high : -high;
  float tail[64 + LANES] = {};
  for (int64_t n = 0; n < count; ++n) {
    const float* row = x + n * dim;
    // A vector may read on into the next row, whose bits are shifted out, but not past the end of all rows.
    if (n * dim + padded_dim > total) {
      for (int64_t d = 0; d < dim; ++d) tail[d] = row[d];
      row = tail;
    }
    uint64_t word = 0;
    for (int64_t d = 0; d < dim; d += LANES) word |= static_cast<uint64_t>(lanes_above(load(row + d), zero)) << d;
    ids[n] = static_cast<int64_t>(reversed(word, dim));
  }
}

}  // namespace

extern const SearchTable table{LANES, ROWS, scan, resolve, scan_few, fsq, lfq};

}  // namespace ISA
}  // namespace tokenzoo
