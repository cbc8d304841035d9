// A fast search that settles most rows, and says which it does not.
#pragma once

#include <cstdint>

#include "search_table.h"

namespace tokenzoo {

// Rows and codes are written as sums of two bfloat16, high + low, in tiles of 16 x 32 values: 256 floats' worth of bytes each.
// A rough screen takes the high ones alone, which settles fewer rows in a third of the time.
constexpr int64_t SCREEN_ROWS = 32;
constexpr int64_t SCREEN_STEP = 32;  // dims of a tile
constexpr int64_t SCREEN_TILE = 256;

inline int64_t screen_steps(int64_t dim) { return (dim + SCREEN_STEP - 1) / SCREEN_STEP; }
// Floats' worth of a panel's tiles, [steps][high, low], and of those of PANEL rows, where only the high ones are there if rough.
inline int64_t screen_floats(int64_t dim, bool rough = false) { return (rough ? 1 : 2) * screen_steps(dim) * SCREEN_TILE; }

// The best score of a row, its code, and the best score of any other code.
struct Lead {
  float best, second;
  int32_t code;
};

namespace amx {

// Whether this processor has AMX and the system lets this process use it.
bool available();
// A panel [dim][PANEL] into tiles. The greatest norm of a code less its high part.
float pack_panel(const float* panel, int64_t dim, float* tiles);
// Rows [count][dim] less the mean into tiles, filled up with zeros to a multiple of SCREEN_ROWS; the norm of each row, and that
// of the row less its high part.
void pack_rows(const float* x, int64_t count, int64_t dim, const float* mean, bool rough, float* tiles, float* norms, float* rests);
// Leads of rows, a multiple of SCREEN_ROWS, among panels [first, last), both even. Scratch: 3 * PANEL floats a row.
void scan(const float* rows, int64_t count, int64_t dim, bool rough, const float* panels, const float* bias, int64_t first,
          int64_t last, float* scratch, Lead* leads);

}  // namespace amx
}  // namespace tokenzoo
