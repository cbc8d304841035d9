// What each instruction set provides to the operators.
#pragma once

#include <cstdint>

namespace tokenzoo {

// Codes in a panel: the unit in which codes are packed, and in which the winner is first located.
constexpr int PANEL = 16;

// Widths above DEEP are searched a slice of at most SLICE dims at a time, for DEEP_PANELS panels: what is in use fits L1.
constexpr int64_t DEEP = 192;
constexpr int64_t SLICE = 128;
constexpr int64_t DEEP_PANELS = 4;

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
  // Rows [count][dim], at most a tile of them, into a tile [dim][rows] less the mean; which rows are not finite.
  void (*pack)(const float* x, int64_t count, int64_t dim, const float* mean, float* tile, bool* broken);
  // Largest score of each row of a tile over panels [first, last), into best and where, which hold the result so far.
  void (*scan)(const float* tile, const float* panels, const float* bias, int64_t dim, int64_t first, int64_t last, float* best,
               int32_t* where);
  // First code of the largest score, for the first `count` rows of a tile whose panels are known.
  void (*resolve)(const float* tile, int64_t count, const float* panels, const float* bias, int64_t dim, const float* best,
                  const int32_t* where, int32_t* codes);
  // Largest score and its first code for each of some rows [count][dim] over panels [first, last).
  void (*scan_few)(const float* rows, int64_t count, const float* panels, const float* bias, int64_t dim, int64_t first,
                   int64_t last, float* best, int32_t* code);
  // Rows [count][dim] less the mean; which of them are not finite.
  void (*centre)(const float* x, int64_t count, int64_t dim, const float* mean, float* out, bool* broken);
  // The entry of each row into out; returns the sum of squared differences.
  double (*gather)(const float* x, const int64_t* ids, int64_t count, const float* codebook, int64_t width, float* out);
  // Counts the rows of each code in [first, last), and adds them to its sum in their order.
  void (*sum_codes)(const float* rows, const int64_t* ids, int64_t count, int64_t width, int64_t first, int64_t last,
                    int64_t* number, float* total);
  // Takes the entry of each row off its residual and adds it to its total.
  void (*step_residual)(float* residual, float* total, const int64_t* ids, int64_t count, const float* codebook, int64_t width);
  // Levels of finite scalar quantization: how many of its dimension's thresholds each value reaches, and what that means.
  // scratch and parts have room for dim * lanes numbers.
  void (*fsq)(const float* x, int64_t count, int64_t dim, const FsqTables& tables, float* scratch, int32_t* parts, float* codes,
              int64_t* ids);
  // Signs of lookup-free quantization, times `high`, and the signs as bits.
  void (*lfq)(const float* x, int64_t count, int64_t dim, float high, float* codes, int64_t* ids);
};

}  // namespace tokenzoo
