// The CPU operators, against LibTorch's stable ABI: one build serves every Python and every torch from 2.10 on.
//
// Work is split by torch's own parallel_for, so torch.set_num_threads is obeyed. Every result is computed by one thread in
// one order (sums of a tile, then tiles in order; a code's rows in order), so results do not depend on the thread count.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "screen.h"
#include "search_table.h"

namespace tokenzoo {

namespace avx512 { extern const SearchTable table; }
namespace avx2 { extern const SearchTable table; }
namespace portable { extern const SearchTable table; }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FEW_ROWS = 16;
constexpr int64_t FEW_PANELS = 4;                // codes, and their least width, for which rows are not worth packing
constexpr int64_t FEW_CODES_WIDTH = 32;
constexpr int64_t SCREEN_WIDTH = 32;             // least width that is worth a screen
constexpr int64_t FEW_OPEN = 8;                  // rows that are not worth a second screen, which takes SCREEN_ROWS at once
constexpr int64_t SHARED_CODE_BYTES = 8 << 20;   // codes that are better read once by all threads than once by each
constexpr int64_t CODE_BLOCK_BYTES = 16 << 10;   // codes that stay in L1 while the row block passes over them
constexpr int64_t PACK_PANELS = 16;              // panels that are worth a thread
constexpr int MOST_ROWS = 64;                    // of a tile
constexpr int64_t SCALAR_ROWS = 4096;            // rows of scalar quantization that are worth a thread
constexpr int64_t SPARE_FLOATS = 256 << 10;      // scratch that a thread keeps: the largest piece, and how many
constexpr size_t MOST_SPARES = 6;
constexpr int64_t SUM_GROUPS = 32;               // of rows, that are summed up apart: no more threads are of use
constexpr int64_t ROWS_A_CODE = 4;               // in a group, at least, for the groups' own sums to be worth it
constexpr double MOST_NORM = 1e18;               // of an entry, beyond which scores might overflow
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

std::string_view wanted_isa() {
  const char* wish = std::getenv("TOKENZOO_ISA");
  return wish ? wish : "amx";
}

// The widest instruction set of this processor, or the one that TOKENZOO_ISA names.
const SearchTable& search() {
  static const SearchTable* chosen = [] {
#if defined(__x86_64__) || defined(_M_X64)
    const std::string_view name = wanted_isa();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if ((name == "amx" || name == "avx512") && has_avx512) return &avx512::table;
    if (name != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
    return &portable::table;
  }();
  return *chosen;
}

bool has_screen() {
  static const bool answer = wanted_isa() == "amx" && search().lanes == 16 && amx::available();  // asked with AVX-512 in hand
  return answer;
}

bool screening(int64_t dim) { return dim >= SCREEN_WIDTH && has_screen(); }

// Packed rows of a thread: they share its L2 with the codes.
int64_t row_block_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) / 2, 192 << 10, 384 << 10);
#else
  constexpr int64_t bytes = 192 << 10;
#endif
  return bytes;
}

// Scratch memory, aligned. What a thread gives back it keeps for the next block: fresh pages cost more than many a search.
struct Free {
  void operator()(float* p) const { std::free(p); }
};
struct Spare {
  std::unique_ptr<float[], Free> memory;
  int64_t floats;
};
thread_local std::vector<Spare> spares;

struct GiveBack {
  int64_t floats;
  void operator()(float* p) const {
    if (floats <= SPARE_FLOATS && spares.size() < MOST_SPARES) {
      spares.push_back({std::unique_ptr<float[], Free>(p), floats});
    } else {
      std::free(p);
    }
  }
};
using Buffer = std::unique_ptr<float[], GiveBack>;

Buffer buffer(int64_t floats) {
  const auto fitting = std::find_if(spares.begin(), spares.end(), [&](const Spare& spare) {
    return floats <= spare.floats && spare.floats <= 2 * floats;
  });
  if (fitting != spares.end()) {
    Buffer found(fitting->memory.release(), {fitting->floats});
    spares.erase(fitting);
    return found;
  }
  const int64_t whole = (std::max<int64_t>(floats, 1) + 15) / 16 * 16;
  return Buffer(static_cast<float*>(std::aligned_alloc(64, whole * sizeof(float))), {whole});
}

template <class F>
void parallel(int64_t count, const F& body) {
  if (count == 1) return body(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A packed codebook, all float32: [bias, even panels * PANEL][panels][dim][PANEL], for a screen [even panels][tiles][greatest
// norm of an entry, greatest norm of one less its high part, space to PANEL], [mean, dim].
struct Packed {
  int64_t size, dim, panels, even;
  float *bias, *codes, *tiles, *greatest, *mean;

  Packed(float* data, int64_t size, int64_t dim)
      : size(size), dim(dim), panels((size + PANEL - 1) / PANEL), even((panels + 1) / 2 * 2), bias(data), codes(bias + even * PANEL),
        tiles(screening(dim) ? codes + panels * dim * PANEL : nullptr),
        greatest(tiles ? tiles + even * screen_floats(dim) : nullptr), mean(greatest ? greatest + PANEL : codes + panels * dim * PANEL) {}

  static int64_t floats(int64_t size, int64_t dim) {
    const Packed shape(nullptr, size, dim);
    const int64_t screen = screening(dim) ? shape.even * screen_floats(dim) + PANEL : 0;
    return shape.even * PANEL + shape.panels * dim * PANEL + screen + dim;
  }
  int64_t panels_per_block() const {
    return dim > DEEP ? DEEP_PANELS : std::max<int64_t>(1, CODE_BLOCK_BYTES / (dim * PANEL * 4));
  }
  Packed without_screen() const {
    Packed plain = *this;
    plain.tiles = nullptr;
    return plain;
  }
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Tensor make(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

// The mean of the entries is subtracted from both sides (distances do not change), so that data with a large common offset
// loses no digits; not for `dot`, where it would change the scores.
void pack_entries(const float* entries, bool dot, const Packed& packed) {
  const int64_t size = packed.size, width = packed.dim;
  std::fill_n(packed.mean, packed.dim, 0.f);
  if (!dot) {
    std::vector<double> sums(width);
    int64_t finite = 0;
    for (int64_t k = 0; k < size; ++k) {
      const float* entry = entries + k * width;
      float check = 0;
      for (int64_t d = 0; d < width; ++d) check += entry[d] * 0.f;
      if (!(check == 0.f)) continue;
      ++finite;
      for (int64_t d = 0; d < width; ++d) sums[d] += entry[d];
    }
    for (int64_t d = 0; d < width && finite; ++d) packed.mean[d] = static_cast<float>(sums[d] / static_cast<double>(finite));
  }
  std::fill_n(packed.bias, packed.even * PANEL, LOWEST);
  std::vector<double> greatest(packed.panels), rests(packed.panels);
  parallel((packed.panels + PACK_PANELS - 1) / PACK_PANELS, [&](int64_t block) {
    for (int64_t p = block * PACK_PANELS; p < std::min(packed.panels, (block + 1) * PACK_PANELS); ++p) {
      float* panel = packed.codes + p * packed.dim * PANEL;
      const int64_t here = std::min<int64_t>(PANEL, size - p * PANEL);
      double norms[PANEL] = {};
      std::fill_n(panel, packed.dim * PANEL, 0.f);
      for (int64_t d = 0; d < width; ++d)
        for (int64_t i = 0; i < here; ++i) {
          const float value = entries[(p * PANEL + i) * width + d] - packed.mean[d];
          panel[d * PANEL + i] = value;
          norms[i] += static_cast<double>(value) * value;
        }
      for (int64_t i = 0; i < PANEL; ++i) {
        // An entry that is not finite can be nearest to nothing.
        const bool usable = i < here && std::isfinite(norms[i]);
        packed.bias[p * PANEL + i] = !usable ? LOWEST : dot ? 0.f : static_cast<float>(-norms[i] / 2);
        if (!usable)
          for (int64_t d = 0; d < width; ++d) panel[d * PANEL + i] = 0.f;
        else
          greatest[p] = std::max(greatest[p], norms[i]);
      }
      if (packed.tiles) rests[p] = amx::pack_panel(panel, width, packed.tiles + p * screen_floats(width));
    }
  });
  if (packed.tiles) {
    if (packed.panels < packed.even) std::fill_n(packed.tiles + packed.panels * screen_floats(width), screen_floats(width), 0.f);
    const double norm = std::sqrt(packed.panels ? *std::max_element(greatest.begin(), greatest.end()) : 0);
    std::fill_n(packed.greatest, PANEL, 0.f);
    packed.greatest[0] = norm < MOST_NORM ? static_cast<float>(norm) : -LOWEST;
    packed.greatest[1] = packed.panels ? static_cast<float>(*std::max_element(rests.begin(), rests.end())) : 0.f;
  }
}

Tensor pack(const Tensor& codebook, bool dot) {
  const int64_t size = codebook.size(0), width = codebook.size(1);
  Tensor out = make(codebook, {Packed::floats(size, width)}, ScalarType::Float);
  pack_entries(floats(codebook), dot, Packed(static_cast<float*>(out.mutable_data_ptr()), size, width));
  return out;
}

// Rows packed into tiles, and the panel of each row's best score.
struct Tiles {
  const SearchTable& isa = search();
  int64_t count, dim, floats;
  Buffer data;
  std::unique_ptr<bool[]> broken;
  std::vector<float> best;
  std::vector<int32_t> where;

  Tiles(int64_t most, int64_t dim) : count(0), dim(dim), floats(dim * isa.rows), data(buffer(padded_rows(most) * dim)),
        broken(new bool[padded_rows(most)]), best(padded_rows(most)), where(padded_rows(most)) {}

  int64_t padded_rows(int64_t rows) const { return (rows + isa.rows - 1) / isa.rows * isa.rows; }
  int64_t rows(int64_t first) const { return std::min<int64_t>(isa.rows, count - first); }

  void fill(const float* x, int64_t rows_given, const Packed& packed) {
    count = rows_given;
    for (int64_t n = 0; n < count; n += isa.rows)
      isa.pack(x + n * dim, rows(n), dim, packed.mean, data.get() + n * dim, broken.get() + n);
  }
  // Over panels [first, last), into the results of padded_rows(count) rows.
  void scan(const Packed& packed, int64_t first, int64_t last, float* best, int32_t* where) const {
    std::fill_n(best, padded_rows(count), LOWEST);
    std::fill_n(where, padded_rows(count), static_cast<int32_t>(first));
    const int64_t step = packed.panels_per_block();
    for (int64_t start = first; start < last; start += step)
      for (int64_t n = 0; n < count; n += isa.rows)
        isa.scan(data.get() + n * dim, packed.codes, packed.bias, dim, start, std::min(last, start + step), best + n, where + n);
  }
  void resolve(const Packed& packed, int64_t* ids) const {
    int32_t codes[MOST_ROWS];
    for (int64_t n = 0; n < count; n += isa.rows) {
      isa.resolve(data.get() + n * dim, rows(n), packed.codes, packed.bias, dim, best.data() + n, where.data() + n, codes);
      for (int64_t i = 0; i < rows(n); ++i) ids[n + i] = broken[n + i] ? 0 : codes[i];
    }
  }
  void search_all(const float* x, int64_t rows_given, const Packed& packed, int64_t* ids) {
    fill(x, rows_given, packed);
    scan(packed, 0, packed.panels, best.data(), where.data());
    resolve(packed, ids);
  }
};

// Parts into which the threads split the codes for `count` rows.
int64_t code_parts(int64_t count, const Packed& packed) {
  const int64_t work = packed.panels * PANEL * packed.dim * count;
  return std::clamp<int64_t>(work >> 16, 1, std::min<int64_t>(torch::stable::get_num_threads(), packed.panels));
}

// Rows of a block: as many tiles as fit the cache, and blocks enough that the threads share them evenly.
int64_t rows_per_block(int64_t count, int64_t dim) {
  const int64_t rows = search().rows, threads = torch::stable::get_num_threads();
  const int64_t tiles = (count + rows - 1) / rows;
  const int64_t fitting = std::clamp<int64_t>(row_block_bytes() / (dim * rows * 4), 1, 64);
  const int64_t rounds = (tiles + fitting * threads - 1) / (fitting * threads);
  return (tiles + rounds * threads - 1) / (rounds * threads) * rows;
}

// Rows as tiles of a screen.
struct Screen {
  int64_t count, padded, dim;
  bool rough;
  Buffer rows, norms, rests, scratch;

  Screen(const float* x, int64_t count, const Packed& packed, int64_t parts, bool rough)
      : count(count), padded((count + SCREEN_ROWS - 1) / SCREEN_ROWS * SCREEN_ROWS), dim(packed.dim), rough(rough),
        rows(buffer(padded / PANEL * screen_floats(dim, rough))), norms(buffer(padded)), rests(buffer(padded)),
        scratch(buffer(parts * padded * 3 * PANEL)) {
    amx::pack_rows(x, count, dim, packed.mean, rough, rows.get(), norms.get(), rests.get());
  }
  void scan(const Packed& packed, int64_t part, int64_t first, int64_t last, Lead* leads) const {
    amx::scan(rows.get(), padded, dim, rough, packed.tiles, packed.bias, first, last, scratch.get() + part * padded * 3 * PANEL,
              leads + part * padded);
  }
  // Finds the ids of all rows but those that it returns. Each part is a range of panels, with leads and states of its own.
  //
  // No code is nearest to a row whose score is below the best by more than twice what the screen and the search in float32 can
  // be wrong by together: by rounding, in 3 * dim additions in the screen and dim in the search, by what high and low leave out
  // (two rests of 2^-17, and low * low of 2^-16), by all but the high parts if rough, and by underflow. Where others remain
  // beside the best, a fine screen compares them in float32, if all of them are known: a state remembers one code of each lane.
  std::vector<int64_t> settle(const float* x, const Packed& packed, int64_t parts, const Lead* leads, int64_t* ids) const {
    const float wrong = (5 * static_cast<float>(dim) + 64) * 0x1p-24f + 8.1f * 0x1p-18f;
    const float reach = packed.greatest[0] + 1e-15f, code_rest = rough ? packed.greatest[1] + 1e-15f : 0.f;
    Buffer row = buffer(dim);
    std::vector<int64_t> open;
    for (int64_t n = 0; n < count; ++n) {
      Lead lead = leads[n];
      for (int64_t part = 1; part < parts; ++part) {
        const Lead& other = leads[part * padded + n];
        const float loser = std::min(lead.best, other.best);
        const float second = std::max({lead.second, other.second, loser});
        if (other.best > lead.best) lead = other;
        lead.second = second;
      }
      const float norm = 1.001f * (norms[n] + 1e-15f), rest = rough ? 1.001f * (rests[n] + 1e-15f) : 0.f;
      const float error = wrong * (norm * reach + reach * reach / 2) + 1.01f * (rest * reach + norm * code_rest);
      const float least = lead.best - 2 * error - 1e-30f;
      if (lead.second < least) {
        ids[n] = lead.code;
      } else {
        ids[n] = rough || packed.panels <= FEW_PANELS ? -1 : compare(x + n * dim, packed, parts, n, least, row.get());
      }
      if (ids[n] < 0) open.push_back(n);
    }
    return open;
  }

  // The nearest of the codes whose score is `least` or more; -1 where not all of them are known.
  int64_t compare(const float* x, const Packed& packed, int64_t parts, int64_t n, float least, float* row) const {
    bool broken;
    search().centre(x, 1, dim, packed.mean, row, &broken);
    float best = LOWEST;
    int32_t code = -1;
    for (int64_t part = 0; part < parts; ++part) {
      const float* state = scratch.get() + (part * padded + n) * 3 * PANEL;
      for (int64_t lane = 0; lane < PANEL; ++lane) {
        if (!(state[PANEL + lane] < least)) return -1;
        if (state[lane] < least) continue;
        const int32_t panel = reinterpret_cast<const int32_t*>(state)[2 * PANEL + lane];
        float score;
        int32_t candidate;
        search().scan_few(row, 1, packed.codes, packed.bias, dim, panel, panel + 1, &score, &candidate);
        if (score > best || (score == best && candidate < code)) {
          best = score;
          code = candidate;
        }
      }
    }
    return code;
  }
};

// Searches the open rows another way.
template <class Search>
void search_open(const float* x, const std::vector<int64_t>& open, int64_t dim, int64_t* ids, const Search& search) {
  if (open.empty()) return;
  const int64_t count = static_cast<int64_t>(open.size());
  Buffer rows = buffer(count * dim);
  for (int64_t n = 0; n < count; ++n) std::copy_n(x + open[n] * dim, dim, rows.get() + n * dim);
  std::vector<int64_t> found(count);
  search(rows.get(), count, found.data());
  for (int64_t n = 0; n < count; ++n) ids[open[n]] = found[n];
}

// Some rows, many codes: the threads share the codes instead, and the best of their answers is taken in order.
void search_shared(const float* x, int64_t count, const Packed& packed, int64_t* ids) {
  Tiles tiles(count, packed.dim);
  tiles.fill(x, count, packed);
  const int64_t parts = code_parts(count, packed), rows = tiles.padded_rows(count);
  std::vector<float> best(parts * rows);
  std::vector<int32_t> where(parts * rows);
  parallel(parts, [&](int64_t p) {
    tiles.scan(packed, packed.panels * p / parts, packed.panels * (p + 1) / parts, best.data() + p * rows, where.data() + p * rows);
  });
  for (int64_t n = 0; n < rows; ++n) {
    int64_t winner = n;
    for (int64_t other = n + rows; other < parts * rows; other += rows)
      if (best[other] > best[winner]) winner = other;
    tiles.best[n] = best[winner];
    tiles.where[n] = where[winner];
  }
  tiles.resolve(packed, ids);
}

// As search_shared, for so few rows that a tile would be mostly empty.
void search_few(const float* x, int64_t count, const Packed& packed, int64_t* ids) {
  Buffer rows = buffer(count * packed.dim);
  bool broken[FEW_ROWS];
  search().centre(x, count, packed.dim, packed.mean, rows.get(), broken);
  const int64_t parts = code_parts(count, packed);
  std::vector<float> best(parts * count);
  std::vector<int32_t> code(parts * count);
  parallel(parts, [&](int64_t p) {
    search().scan_few(rows.get(), count, packed.codes, packed.bias, packed.dim, packed.panels * p / parts,
                      packed.panels * (p + 1) / parts, best.data() + p * count, code.data() + p * count);
  });
  for (int64_t n = 0; n < count; ++n) {
    int64_t winner = 0;
    for (int64_t p = 1; p < parts; ++p)
      if (best[p * count + n] > best[winner * count + n]) winner = p;
    ids[n] = broken[n] ? 0 : code[winner * count + n];
  }
}

// Few codes: to pack rows into tiles would take longer than to score them.
void search_short(const float* x, int64_t count, const Packed& packed, int64_t* ids) {
  Buffer rows = buffer(FEW_ROWS * packed.dim);
  float best[FEW_ROWS];
  int32_t code[FEW_ROWS];
  bool broken[FEW_ROWS];
  for (int64_t first = 0; first < count; first += FEW_ROWS) {
    const int64_t here = std::min(FEW_ROWS, count - first);
    search().centre(x + first * packed.dim, here, packed.dim, packed.mean, rows.get(), broken);
    search().scan_few(rows.get(), here, packed.codes, packed.bias, packed.dim, 0, packed.panels, best, code);
    for (int64_t n = 0; n < here; ++n) ids[first + n] = broken[n] ? 0 : code[n];
  }
}

// How a search goes: where most rows stay open, a screen is a waste.
struct Tally {
  std::atomic<int64_t> rows{0}, open{0};
  bool holds() const { return 2 * open <= rows; }
};
struct Luck {
  Tally rough, fine;
};

// The ids of some rows by one thread: of most by a rough screen, of most others by a fine one.
void search_block(const float* x, int64_t count, const Packed& packed, int64_t* ids, Luck& luck, bool try_rough = true) {
  const bool rough = try_rough && luck.rough.holds();
  Tally& tally = rough ? luck.rough : luck.fine;
  if (packed.tiles && tally.holds()) {
    const Screen screen(x, count, packed, 1, rough);
    std::vector<Lead> leads(screen.padded);
    screen.scan(packed, 0, 0, packed.even, leads.data());
    const std::vector<int64_t> open = screen.settle(x, packed, 1, leads.data(), ids);
    tally.rows += count;
    tally.open += static_cast<int64_t>(open.size());
    search_open(x, open, packed.dim, ids, [&](const float* rows, int64_t number, int64_t* found) {
      search_block(rows, number, rough && number > FEW_OPEN ? packed : packed.without_screen(), found, luck, false);
    });
  } else if (count <= FEW_ROWS || (packed.panels <= FEW_PANELS && packed.dim >= FEW_CODES_WIDTH)) {
    search_short(x, count, packed, ids);
  } else {
    Tiles(count, packed.dim).search_all(x, count, packed, ids);
  }
}

// As search_shared, by a screen.
void screen_shared(const float* x, int64_t count, const Packed& packed, int64_t* ids) {
  const int64_t parts = std::min(code_parts(count, packed), packed.even / 2);
  const Screen screen(x, count, packed, parts, false);
  std::vector<Lead> leads(parts * screen.padded);
  parallel(parts, [&](int64_t p) {
    screen.scan(packed, p, packed.even / 2 * p / parts * 2, packed.even / 2 * (p + 1) / parts * 2, leads.data());
  });
  const std::vector<int64_t> open = screen.settle(x, packed, parts, leads.data(), ids);
  search_open(x, open, packed.dim, ids, [&](const float* rows, int64_t number, int64_t* found) {
    const Packed plain = packed.without_screen();
    number <= FEW_ROWS ? search_few(rows, number, plain, found) : search_shared(rows, number, plain, found);
  });
}

// Calls done(first row, rows) for every block of rows, in parallel, once its ids are known; blocks are whole tiles.
template <class Done>
void search_all(const float* x, int64_t count, const Packed& packed, int64_t* ids, const Done& done) {
  if (!count) return;
  const int64_t tiles = (count + search().rows - 1) / search().rows;
  const bool fits = tiles * search().rows * packed.dim * 4 <= row_block_bytes();
  if (count <= FEW_ROWS) {
    search_few(x, count, packed, ids);
    return done(0, count);
  }
  if (fits && (tiles < torch::stable::get_num_threads() || packed.panels * PANEL * packed.dim * 4 > SHARED_CODE_BYTES)) {
    packed.tiles ? screen_shared(x, count, packed, ids) : search_shared(x, count, packed, ids);
    return done(0, count);
  }
  Luck luck;
  const int64_t step = rows_per_block(count, packed.dim);
  parallel((count + step - 1) / step, [&](int64_t block) {
    const int64_t first = block * step, rows = std::min(step, count - first);
    search_block(x + first * packed.dim, rows, packed, ids + first, luck);
    done(first, rows);
  });
}

Packed view(const Tensor& packed, int64_t size, int64_t width) {
  STD_TORCH_CHECK(packed.numel() == Packed::floats(size, width), "expected the packed form of a codebook (", size, ", ", width,
                  "), got ", packed.numel(), " numbers");
  return Packed(static_cast<float*>(packed.data_ptr()), size, width);
}

Tensor nearest(const Tensor& x, const Tensor& packed, int64_t size) {
  Tensor ids = make(x, {x.size(0)}, ScalarType::Long);
  search_all(floats(x), x.size(0), view(packed, size, x.size(1)), static_cast<int64_t*>(ids.mutable_data_ptr()),
             [](int64_t, int64_t) {});
  return ids;
}

// Every thread sums the codes of a range of its own, rows in order.
std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& ids, int64_t size) {
  const int64_t count = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(ids.numel() == count, "expected ", count, " ids, got ", ids.numel());
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  Tensor counts = make(x, {size}, ScalarType::Float), sums = make(x, {size, width}, ScalarType::Float);
  for (int64_t n = 0; n < count; ++n)
    STD_TORCH_CHECK(id[n] >= 0 && id[n] < size, "expected ids in [0, ", size, "), got ", id[n]);
  std::vector<int64_t> number(size);
  float* total = static_cast<float*>(sums.mutable_data_ptr());
  const int64_t parts = std::clamp<int64_t>((count + size) * width >> 17, 1, std::min<int64_t>(torch::stable::get_num_threads(), size));
  parallel(parts, [&](int64_t p) {
    const int64_t first = size * p / parts, last = size * (p + 1) / parts;
    std::fill_n(total + first * width, (last - first) * width, 0.f);
    search().sum_codes(floats(x), id, count, width, first, last, number.data(), total);
  });
  std::copy(number.begin(), number.end(), static_cast<float*>(counts.mutable_data_ptr()));
  return {counts, sums};
}

// Adds the rows that have other ids than before to the sums of their codes, and takes them from those that they had.
void move_rows(const float* x, const int64_t* ids, const int64_t* before, int64_t count, int64_t width, int64_t* numbers, float* sums) {
  for (int64_t n = 0; n < count; ++n) {
    if (ids[n] == before[n]) continue;
    const float* row = x + n * width;
    float *to = sums + ids[n] * width, *from = sums + before[n] * width;
    for (int64_t d = 0; d < width; ++d) to[d] += row[d];
    for (int64_t d = 0; d < width; ++d) from[d] -= row[d];
    ++numbers[ids[n]];
    --numbers[before[n]];
  }
}

// Ids, and code_sums of them; or, where ids from before are given, by how much these changed. Where there are many rows for every
// code, a block of rows is summed up while it is in the cache: by groups of rows, whose number does not depend on the threads.
std::tuple<Tensor, Tensor, Tensor> assign(const Tensor& x, const Tensor& packed, int64_t size, const Tensor& before) {
  const int64_t count = x.size(0), width = x.size(1);
  const int64_t* old = before.numel() ? static_cast<const int64_t*>(before.const_data_ptr()) : nullptr;
  STD_TORCH_CHECK(!old || before.numel() == count, "expected ", count, " ids from before, got ", before.numel());
  for (int64_t n = 0; old && n < count; ++n)
    STD_TORCH_CHECK(old[n] >= 0 && old[n] < size, "expected ids in [0, ", size, "), got ", old[n]);
  if (count < SUM_GROUPS * ROWS_A_CODE * size) {
    Tensor ids = nearest(x, packed, size);
    if (!old) {
      const auto [counts, sums] = code_sums(x, ids, size);
      return {ids, counts, sums};
    }
    Tensor counts = make(x, {size}, ScalarType::Float), sums = make(x, {size, width}, ScalarType::Float);
    float* total = static_cast<float*>(sums.mutable_data_ptr());
    std::vector<int64_t> numbers(size);
    std::fill_n(total, size * width, 0.f);
    move_rows(floats(x), static_cast<const int64_t*>(ids.const_data_ptr()), old, count, width, numbers.data(), total);
    std::copy(numbers.begin(), numbers.end(), static_cast<float*>(counts.mutable_data_ptr()));
    return {ids, counts, sums};
  }
  const Packed codes = view(packed, size, width);
  Tensor ids = make(x, {count}, ScalarType::Long), counts = make(x, {size}, ScalarType::Float);
  Tensor sums = make(x, {size, width}, ScalarType::Float);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  Buffer totals = buffer(SUM_GROUPS * size * width);
  std::vector<int64_t> numbers(SUM_GROUPS * size);
  Luck luck;
  const int64_t step = rows_per_block(count, width);
  parallel(SUM_GROUPS, [&](int64_t group) {
    const int64_t end = count * (group + 1) / SUM_GROUPS;
    float* total = totals.get() + group * size * width;
    std::fill_n(total, size * width, 0.f);
    for (int64_t first = count * group / SUM_GROUPS; first < end; first += step) {
      const int64_t rows = std::min(step, end - first);
      search_block(floats(x) + first * width, rows, codes, id + first, luck);
      const float* here = floats(x) + first * width;
      int64_t* number = numbers.data() + group * size;
      if (old) move_rows(here, id + first, old + first, rows, width, number, total);
      else search().sum_codes(here, id + first, rows, width, 0, size, number, total);
    }
  });
  float *number = static_cast<float*>(counts.mutable_data_ptr()), *sum = static_cast<float*>(sums.mutable_data_ptr());
  parallel(size, [&](int64_t k) {
    std::copy_n(totals.get() + k * width, width, sum + k * width);
    for (int64_t group = 1; group < SUM_GROUPS; ++group) {
      const float* total = totals.get() + (group * size + k) * width;
      for (int64_t d = 0; d < width; ++d) sum[k * width + d] += total[d];
      numbers[k] += numbers[group * size + k];
    }
    number[k] = static_cast<float>(numbers[k]);
  });
  return {ids, counts, sums};
}

// Ids, entries and loss. Squared errors are added up by blocks of fixed size, so that the order of the summation does not
// depend on the threads.
std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, const Tensor& packed, const Tensor& codebook) {
  const int64_t count = x.size(0), width = x.size(1), block = search().rows;
  Tensor ids = make(x, {count}, ScalarType::Long), out = make(x, {count, width}, ScalarType::Float);
  Tensor loss = make(x, {}, ScalarType::Float);
  std::vector<double> errors((count + block - 1) / block);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* vectors = static_cast<float*>(out.mutable_data_ptr());
  search_all(floats(x), count, view(packed, codebook.size(0), width), id, [&](int64_t first, int64_t rows) {
    for (int64_t n = first; n < first + rows; n += block)
      errors[n / block] = search().gather(floats(x) + n * width, id + n, std::min(block, first + rows - n), floats(codebook),
                                          width, vectors + n * width);
  });
  double total = 0;
  for (const double error : errors) total += error;
  *static_cast<float*>(loss.mutable_data_ptr()) = count ? static_cast<float>(total / static_cast<double>(count * width)) : 0.f;
  return {ids, out, loss};
}

// Every stage quantizes what the stages before it left over; a block of rows stays in the cache for all of them. Without packed
// forms each codebook is packed in its turn, all in one place.
std::tuple<Tensor, Tensor> residual_quantize(const Tensor& x, const std::vector<Tensor>& packed,
                                             const std::vector<Tensor>& codebooks) {
  const int64_t count = x.size(0), width = x.size(1), stages = static_cast<int64_t>(codebooks.size());
  Tensor ids = make(x, {count, stages}, ScalarType::Long), out = make(x, {count, width}, ScalarType::Float);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* vectors = static_cast<float*>(out.mutable_data_ptr());
  if (!count) return {ids, out};
  const int64_t size = stages ? codebooks[0].size(0) : 0;
  Buffer form = buffer(packed.empty() ? Packed::floats(size, width) : 0);
  const auto quantize_rows = [&](int64_t first, int64_t rows, const auto& search_stage) {
    Buffer residual = buffer(rows * width);
    std::vector<int64_t> found(rows);
    std::memcpy(residual.get(), floats(x) + first * width, rows * width * sizeof(float));
    std::fill_n(vectors + first * width, rows * width, 0.f);
    for (int64_t stage = 0; stage < stages; ++stage) {
      const float* entries = floats(codebooks[stage]);
      const Packed codes = packed.empty() ? Packed(form.get(), size, width) : view(packed[stage], size, width);
      if (packed.empty()) pack_entries(entries, false, codes);
      search_stage(residual.get(), codes, found.data(), [&](int64_t at, int64_t here) {
        float *left = residual.get() + at * width, *sum = vectors + (first + at) * width;
        search().step_residual(left, sum, found.data() + at, here, entries, width);
        for (int64_t n = at; n < at + here; ++n) id[(first + n) * stages + stage] = found[n];
      });
    }
  };
  const int64_t step = rows_per_block(count, width);
  if (packed.empty() || count < search().rows * torch::stable::get_num_threads()) {
    quantize_rows(0, count, [&](const float* residual, const Packed& codes, int64_t* found, const auto& done) {
      search_all(residual, count, codes, found, done);
    });
  } else {
    Luck luck;
    parallel((count + step - 1) / step, [&](int64_t block) {
      const int64_t first = block * step, rows = std::min(step, count - first);
      quantize_rows(first, rows, [&](const float* residual, const Packed& codes, int64_t* found, const auto& done) {
        search_block(residual, rows, codes, found, luck);
        done(0, rows);
      });
    });
  }
  return {ids, out};
}

// Finite scalar quantization by thresholds [levels - 1, dim] (+inf where a dimension has fewer): codes are
// level * scale + shift, ids the sum of level * basis.
std::tuple<Tensor, Tensor> fsq(const Tensor& x, const Tensor& thresholds, const Tensor& scale, const Tensor& shift,
                               const Tensor& basis) {
  const int64_t count = x.size(0), width = x.size(1), span = width * search().lanes;
  Tensor ids = make(x, {count}, ScalarType::Long), codes = make(x, {count, width}, ScalarType::Float);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* code = static_cast<float*>(codes.mutable_data_ptr());
  const auto spread = [&](const auto* table, int64_t rows) {
    std::vector<std::remove_cvref_t<decltype(*table)>> out(rows * span);
    for (int64_t i = 0; i < rows * span; ++i) out[i] = table[i / span * width + i % width];
    return out;
  };
  const auto limits = spread(floats(thresholds), thresholds.size(0)), factors = spread(floats(scale), 1),
             offsets = spread(floats(shift), 1);
  const auto weights = spread(static_cast<const int32_t*>(basis.const_data_ptr()), 1);
  const FsqTables tables{thresholds.size(0), limits.data(), factors.data(), offsets.data(), weights.data()};
  parallel((count + SCALAR_ROWS - 1) / SCALAR_ROWS, [&](int64_t block) {
    const int64_t first = block * SCALAR_ROWS;
    std::vector<float> scratch(span);
    std::vector<int32_t> parts(span);
    search().fsq(floats(x) + first * width, std::min(SCALAR_ROWS, count - first), width, tables, scratch.data(), parts.data(),
                 code + first * width, id + first);
  });
  return {codes, ids};
}

// Lookup-free quantization: the sign of each value, and the signs as bits, the first dimension the highest.
std::tuple<Tensor, Tensor> lfq(const Tensor& x, double scale) {
  const int64_t count = x.size(0), width = x.size(1);
  Tensor ids = make(x, {count}, ScalarType::Long), codes = make(x, {count, width}, ScalarType::Float);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* code = static_cast<float*>(codes.mutable_data_ptr());
  parallel((count + SCALAR_ROWS - 1) / SCALAR_ROWS, [&](int64_t block) {
    const int64_t first = block * SCALAR_ROWS;
    search().lfq(floats(x) + first * width, std::min(SCALAR_ROWS, count - first), width, static_cast<float>(scale),
                 code + first * width, id + first);
  });
  return {codes, ids};
}

// Bits in a register of the instruction set in use.
int64_t instruction_set() { return search().lanes * 32; }

}  // namespace

STABLE_TORCH_LIBRARY(tokenzoo_native, m) {
  m.def("pack(Tensor codebook, bool dot) -> Tensor");
  m.def("nearest(Tensor x, Tensor packed, int size) -> Tensor");
  m.def("quantize(Tensor x, Tensor packed, Tensor codebook) -> (Tensor, Tensor, Tensor)");
  m.def("assign(Tensor x, Tensor packed, int size, Tensor before) -> (Tensor, Tensor, Tensor)");
  m.def("code_sums(Tensor x, Tensor ids, int size) -> (Tensor, Tensor)");
  m.def("residual_quantize(Tensor x, Tensor[] packed, Tensor[] codebooks) -> (Tensor, Tensor)");
  m.def("fsq(Tensor x, Tensor thresholds, Tensor scale, Tensor shift, Tensor basis) -> (Tensor, Tensor)");
  m.def("lfq(Tensor x, float scale) -> (Tensor, Tensor)");
  m.def("instruction_set() -> int");
  m.def("has_screen() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("assign", TORCH_BOX(&assign));
  m.impl("code_sums", TORCH_BOX(&code_sums));
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize));
  m.impl("fsq", TORCH_BOX(&fsq));
  m.impl("lfq", TORCH_BOX(&lfq));
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("has_screen", TORCH_BOX(&has_screen));
}

}  // namespace tokenzoo
