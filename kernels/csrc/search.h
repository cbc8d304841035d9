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
constexpr int TOGETHER = PARTS > 2 ? 2 : 4;
constexpr float LOWEST = -__builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const IntsUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<IntsUnaligned*>(p) = v; }
inline Vec splat(float value) { return value - Vec{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }

// Adds dims [from, to) of a tile times GROUP codes to their sums.
inline __attribute__((always_inline)) void accumulate(const float* tile, const float* codes, int64_t from, int64_t to,
                                                      Vec (&sums)[ROW_VECTORS][GROUP]) {
  for (int64_t d = from; d < to; ++d) {
    Vec rows[ROW_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) rows[r] = load(tile + d * ROWS + r * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < GROUP; ++j) {
      const Vec code = splat(codes[d * PANEL + j]);
#pragma GCC unroll 4
      for (int r = 0; r < ROW_VECTORS; ++r) sums[r][j] = rows[r] * code + sums[r][j];
    }
  }
}

inline __attribute__((always_inline)) void start_at(const float* bias, Vec (&sums)[ROW_VECTORS][GROUP]) {
#pragma GCC unroll 16
  for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) sums[r][j] = splat(bias[j]);
}

inline __attribute__((always_inline)) void reduce(const Vec (&sums)[ROW_VECTORS][GROUP], Vec (&top)[ROW_VECTORS]) {
#pragma GCC unroll 16
  for (int j = 0; j < GROUP / 2; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < ROW_VECTORS; ++r) top[r] = vmax(vmax(sums[r][j], sums[r][j + GROUP / 2]), top[r]);
}

// The largest score of each row of a tile so far, and the panel it is in.
struct Leaders {
  Vec highest[ROW_VECTORS];
  Ints found[ROW_VECTORS];

  Leaders(const float* best, const int32_t* where) {
    for (int r = 0; r < ROW_VECTORS; ++r) {
      highest[r] = load(best + r * LANES);
      found[r] = load(where + r * LANES);
    }
  }
  void meet(const Vec (&top)[ROW_VECTORS], int64_t panel) {
    for (int r = 0; r < ROW_VECTORS; ++r) {
      const Ints better = top[r] > highest[r];
      highest[r] = vmax(top[r], highest[r]);
      found[r] = better ? splat(static_cast<int32_t>(panel)) : found[r];
    }
  }
  void keep(float* best, int32_t* where) const {
    for (int r = 0; r < ROW_VECTORS; ++r) {
      store(best + r * LANES, highest[r]);
      store(where + r * LANES, found[r]);
    }
  }
};

void scan_whole(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
                int32_t* where) {
  Leaders leaders(best, where);
  for (int64_t panel = first; panel < last; ++panel) {
    Vec top[ROW_VECTORS];
    for (int r = 0; r < ROW_VECTORS; ++r) top[r] = splat(LOWEST);
    for (int g = 0; g < PANEL; g += GROUP) {
      Vec sums[ROW_VECTORS][GROUP];
      start_at(bias + panel * PANEL + g, sums);
      accumulate(tile, panels + panel * dim * PANEL + g, 0, dim, sums);
      reduce(sums, top);
    }
    leaders.meet(top, panel);
  }
  leaders.keep(best, where);
}

// For widths of which a tile is more than L1 holds: a slice of the dims at a time, which then stays in L1 while some panels
// pass; the sums wait in memory. They are added up in the same order as in one go.
void scan_slices(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
                 int32_t* where) {
  Leaders leaders(best, where);
  alignas(64) float waiting[DEEP_PANELS * PANEL * ROWS];
  const int64_t slices = (dim + SLICE - 1) / SLICE;
  for (int64_t start = first; start < last; start += DEEP_PANELS) {
    const int64_t end = start + DEEP_PANELS < last ? start + DEEP_PANELS : last;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t from = dim * slice / slices, to = dim * (slice + 1) / slices;
      for (int64_t panel = start; panel < end; ++panel) {
        Vec top[ROW_VECTORS];
        for (int r = 0; r < ROW_VECTORS; ++r) top[r] = splat(LOWEST);
        for (int g = 0; g < PANEL; g += GROUP) {
          float* saved = waiting + ((panel - start) * PANEL + g) * ROWS;
          Vec sums[ROW_VECTORS][GROUP];
          if (slice == 0) {
            start_at(bias + panel * PANEL + g, sums);
          } else {
#pragma GCC unroll 16
            for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
              for (int r = 0; r < ROW_VECTORS; ++r) sums[r][j] = load(saved + (j * ROW_VECTORS + r) * LANES);
          }
          accumulate(tile, panels + panel * dim * PANEL + g, from, to, sums);
          if (slice + 1 < slices) {
#pragma GCC unroll 16
            for (int j = 0; j < GROUP; ++j)
#pragma GCC unroll 4
              for (int r = 0; r < ROW_VECTORS; ++r) store(saved + (j * ROW_VECTORS + r) * LANES, sums[r][j]);
          } else {
            reduce(sums, top);
          }
        }
        if (slice + 1 == slices) leaders.meet(top, panel);
      }
    }
  }
  leaders.keep(best, where);
}

void scan(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
          int32_t* where) {
  const auto search = dim > DEEP ? scan_slices : scan_whole;
  search(tile, panels, bias, dim, first, last, best, where);
}

// Packs rows [count][dim], count up to ROWS, into a tile [dim][ROWS], less the mean. Missing rows are zero.
void pack(const float* x, int64_t count, int64_t dim, const float* mean, float* tile, bool* broken) {
  Vec check[ROW_VECTORS] = {};
  for (int r = 0; r < ROW_VECTORS; ++r) {
    const int64_t here = count - r * LANES < LANES ? count - r * LANES : LANES;
    const float* rows = x + r * LANES * dim;
    for (int64_t d = 0; d < dim; ++d) {
      Vec value = splat(0.f);
      if (here == LANES) {
        value = strided(rows + d, dim) - splat(mean[d]);
      } else {
        for (int64_t i = 0; i < here; ++i) value[i] = rows[i * dim + d] - mean[d];
      }
      store(tile + d * ROWS + r * LANES, value);
      check[r] += value * splat(0.f);
    }
  }
  for (int n = 0; n < ROWS; ++n) broken[n] = !(check[n / LANES][n % LANES] == 0.f);
}

// COUNT rows side by side, so that their chains of additions overlap.
template <int COUNT>
inline void resolve_rows(const float* tile, const float* panels, const float* bias, int64_t dim, const float* best,
                         const int32_t* where, int32_t* codes) {
  Vec sums[COUNT][PARTS];
  const float* panel[COUNT];
#pragma GCC unroll 4
  for (int n = 0; n < COUNT; ++n) {
    panel[n] = panels + where[n] * dim * PANEL;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sums[n][p] = load(bias + where[n] * PANEL + p * LANES);
  }
  for (int64_t d = 0; d < dim; ++d)
#pragma GCC unroll 4
    for (int n = 0; n < COUNT; ++n) {
      const Vec value = splat(tile[d * ROWS + n]);
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) sums[n][p] = value * load(panel[n] + d * PANEL + p * LANES) + sums[n][p];
    }
  for (int n = 0; n < COUNT; ++n) {
    int32_t code = -1;
    for (int p = 0; p < PARTS && code < 0; ++p)
      if (const uint32_t equal = lanes_equal(sums[n][p], splat(best[n]))) code = p * LANES + __builtin_ctz(equal);
    if (code < 0) {
      // A compiler that contracts the two loops differently leaves no score bit-equal; the largest is then the answer.
      code = 0;
      for (int32_t i = 1; i < PANEL; ++i)
        if (sums[n][i / LANES][i % LANES] > sums[n][code / LANES][code % LANES]) code = i;
    }
    codes[n] = where[n] * PANEL + code;
  }
}

void resolve(const float* tile, int64_t count, const float* panels, const float* bias, int64_t dim, const float* best,
             const int32_t* where, int32_t* codes) {
  int64_t n = 0;
  for (; n + TOGETHER <= count; n += TOGETHER)
    resolve_rows<TOGETHER>(tile + n, panels, bias, dim, best + n, where + n, codes + n);
  for (; n < count; ++n) resolve_rows<1>(tile + n, panels, bias, dim, best + n, where + n, codes + n);
}

typedef float Four __attribute__((vector_size(16)));
typedef float FourUnaligned __attribute__((vector_size(16), aligned(4)));

double gather(const float* x, const int64_t* ids, int64_t count, const float* codebook, int64_t width, float* out) {
  Vec wide = splat(0.f);
  Four narrow = {};
  float rest = 0;
  for (int64_t n = 0; n < count; ++n, x += width, out += width) {
    const float* entry = codebook + ids[n] * width;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
      const Vec value = load(entry + d), error = value - load(x + d);
      store(out + d, value);
      wide += error * error;
    }
    for (; d + 4 <= width; d += 4) {
      const Four value = *reinterpret_cast<const FourUnaligned*>(entry + d);
      const Four error = value - *reinterpret_cast<const FourUnaligned*>(x + d);
      *reinterpret_cast<FourUnaligned*>(out + d) = value;
      narrow += error * error;
    }
    for (; d < width; ++d) {
      out[d] = entry[d];
      rest += (entry[d] - x[d]) * (entry[d] - x[d]);
    }
  }
  double total = static_cast<double>(rest);
  for (int i = 0; i < LANES; ++i) total += static_cast<double>(wide[i]);
  for (int i = 0; i < 4; ++i) total += static_cast<double>(narrow[i]);
  return total;
}

// Rows [count][dim] less the mean; which of them are not finite.
void centre(const float* x, int64_t count, int64_t dim, const float* mean, float* out, bool* broken) {
  for (int64_t n = 0; n < count; ++n, x += dim, out += dim) {
    Vec check = splat(0.f);
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      const Vec value = load(x + d) - load(mean + d);
      store(out + d, value);
      check += value * splat(0.f);
    }
    float rest = 0;
    for (; d < dim; ++d) {
      out[d] = x[d] - mean[d];
      rest += out[d] * 0.f;
    }
    for (int i = 0; i < LANES; ++i) rest += check[i];
    broken[n] = !(rest == 0.f);
  }
}

void sum_codes(const float* rows, const int64_t* ids, int64_t count, int64_t width, int64_t first, int64_t last,
               int64_t* number, float* total) {
  for (int64_t n = 0; n < count; ++n, rows += width) {
    if (ids[n] < first || ids[n] >= last) continue;
    ++number[ids[n]];
    float* sum = total + ids[n] * width;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) store(sum + d, load(sum + d) + load(rows + d));
    for (; d + 4 <= width; d += 4)
      *reinterpret_cast<FourUnaligned*>(sum + d) += *reinterpret_cast<const FourUnaligned*>(rows + d);
    for (; d < width; ++d) sum[d] += rows[d];
  }
}

void step_residual(float* residual, float* total, const int64_t* ids, int64_t count, const float* codebook, int64_t width) {
  for (int64_t n = 0; n < count; ++n, residual += width, total += width) {
    const float* entry = codebook + ids[n] * width;
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
      const Vec value = load(entry + d);
      store(residual + d, load(residual + d) - value);
      store(total + d, load(total + d) + value);
    }
    for (; d < width; ++d) {
      residual[d] -= entry[d];
      total[d] += entry[d];
    }
  }
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
    for (; n + 8 <= count; n += 8) few_rows<8, 2>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
  for (; n + 4 <= count; n += 4) few_rows<4, FEW / 4>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
  for (; n + 3 <= count; n += 3) few_rows<3, FEW / 4>(rows + n * dim, panels, bias, dim, first, last, best + n, code + n);
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

extern const SearchTable table{LANES,    ROWS,     pack,          scan, resolve,
                               scan_few, centre,   gather, sum_codes,      step_residual, fsq, lfq};

}  // namespace ISA
}  // namespace tokenzoo
