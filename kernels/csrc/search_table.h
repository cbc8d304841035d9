// What each instruction set provides to the operators.
#pragma once

#include <cstdint>

namespace tokenzoo {

// Codes in a panel: the unit in which codes are packed, and in which the winner is first located.
constexpr int PANEL = 16;

// Tables of finite scalar quantization, each row spread out over dim * lanes entries.
struct FsqTables {
  int64_t num_thresholds;
  const float* thresholds;
  const float* scale;
  const float* shift;
  const int32_t* basis;
};

struct SearchTable {
  // Floats in a register.
  int lanes;
  // Rows in a tile.
  int rows;
  // Largest score of each row of a tile over panels [first, last), into best and where, which hold the result so far.
  void (*scan)(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
               int32_t* where);
  // First code of the largest score within one panel, for one row whose values lie `stride` apart.
  int32_t (*resolve)(const float* row, int64_t stride, const float* panel, const float* bias, int64_t dim, float score);
  // Largest score and its first code for each of a few rows [count][dim] over panels [first, last).
  void (*scan_few)(const float* rows, int64_t count, const float* panels, const float* bias, int64_t dim, int64_t first,
                   int64_t last, float* best, int32_t* code);
  // Levels of finite scalar quantization: how many of its dimension's thresholds each value reaches, and what that means.
  // scratch and parts have room for dim * lanes numbers.
  void (*fsq)(const float* x, int64_t count, int64_t dim, const FsqTables& tables, float* scratch, int32_t* parts, float* codes,
              int64_t* ids);
  // Signs of lookup-free quantization, times `high`, and the signs as bits.
  void (*lfq)(const float* x, int64_t count, int64_t dim, float high, float* codes, int64_t* ids);
};

// Padded width: small widths are rounded up, so that their loops have a length known to the compiler.
inline int64_t padded(int64_t dim) { return dim <= 16 ? (dim + 3) / 4 * 4 : dim; }

}  // namespace tokenzoo
