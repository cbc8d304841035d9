// The CPU operators, against LibTorch's stable ABI: one build serves every Python and every torch from 2.10 on.
//
// Work is split by torch's own parallel_for, so torch.set_num_threads is obeyed. Every result is computed by one thread in
// one order (sums of a tile, then tiles in order; a code's rows in order), so results do not depend on the thread count.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "search_table.h"

namespace tokenzoo {

namespace avx512 { extern const SearchTable table; }
namespace avx2 { extern const SearchTable table; }
namespace portable { extern const SearchTable table; }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FEW_ROWS = 16;
constexpr int64_t ROW_BLOCK_BYTES = 192 << 10;   // packed rows of a thread: they share its L2 with the codes
constexpr int64_t CODE_BLOCK_BYTES = 16 << 10;   // codes that stay in L1 while the row block passes over them
constexpr int64_t SCALAR_ROWS = 4096;            // rows of scalar quantization that are worth a thread
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The widest instruction set of this processor, or the one that TOKENZOO_ISA names.
const SearchTable& search() {
  static const SearchTable* chosen = [] {
#if defined(__x86_64__) || defined(_M_X64)
    const char* wish = std::getenv("TOKENZOO_ISA");
    const std::string_view name = wish ? wish : "avx512";
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (name == "avx512" && has_avx512) return &avx512::table;
    if (name != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
    return &portable::table;
  }();
  return *chosen;
}

struct AlignedFree {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], AlignedFree>;

Buffer buffer(int64_t floats) {
  return Buffer(static_cast<float*>(std::aligned_alloc(64, (std::max<int64_t>(floats, 1) * 4 + 63) / 64 * 64)));
}

template <class F>
void parallel(int64_t count, const F& body) {
  if (count == 1) return body(0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A packed codebook: [mean, dim][bias, panels * PANEL][panels][dim][PANEL], all float32; dim is the padded width.
struct Packed {
  int64_t size, width, dim, panels;
  float *mean, *bias, *codes;

  Packed(float* data, int64_t size, int64_t width)
      : size(size), width(width), dim(padded(width)), panels((size + PANEL - 1) / PANEL), mean(data), bias(mean + dim),
        codes(bias + panels * PANEL) {}

  static int64_t floats(int64_t size, int64_t width) {
    const Packed shape(nullptr, size, width);
    return shape.dim + shape.panels * PANEL * (1 + shape.dim);
  }
  int64_t panels_per_block() const { return std::max<int64_t>(1, CODE_BLOCK_BYTES / (dim * PANEL * 4)); }
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

Tensor make(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

// The mean of the entries is subtracted from both sides (distances do not change), so that data with a large common offset
// loses no digits; not for `dot`, where it would change the scores.
Tensor pack(const Tensor& codebook, bool dot) {
  const int64_t size = codebook.size(0), width = codebook.size(1);
  Tensor out = make(codebook, {Packed::floats(size, width)}, ScalarType::Float);
  const Packed packed(static_cast<float*>(out.mutable_data_ptr()), size, width);
  const float* entries = floats(codebook);
  std::fill_n(packed.mean, packed.dim, 0.f);
  if (!dot) {
    std::vector<double> sums(width);
    for (int64_t k = 0; k < size; ++k)
      for (int64_t d = 0; d < width; ++d) sums[d] += entries[k * width + d];
    for (int64_t d = 0; d < width; ++d) {
      const float mean = static_cast<float>(sums[d] / static_cast<double>(size));
      packed.mean[d] = std::isfinite(mean) ? mean : 0.f;
    }
  }
  parallel(packed.panels, [&](int64_t p) {
    float* panel = packed.codes + p * packed.dim * PANEL;
    std::fill_n(panel, packed.dim * PANEL, 0.f);
    for (int64_t i = 0; i < PANEL; ++i) {
      const int64_t k = p * PANEL + i;
      double norm = 0;
      if (k < size)
        for (int64_t d = 0; d < width; ++d) {
          const float value = entries[k * width + d] - packed.mean[d];
          panel[d * PANEL + i] = value;
          norm += static_cast<double>(value) * value;
        }
      // An entry that is not finite can be nearest to nothing.
      const bool usable = k < size && std::isfinite(norm);
      packed.bias[k] = !usable ? LOWEST : dot ? 0.f : static_cast<float>(-norm / 2);
      if (!usable)
        for (int64_t d = 0; d < width; ++d) panel[d * PANEL + i] = 0.f;
    }
  });
  return out;
}

// Packs rows [first, first + count) of x into tiles [dim][rows]; `broken[r]` says which rows are not finite.
void pack_tile(const float* x, int64_t count, const Packed& packed, int rows, float* tile, bool* broken) {
  for (int r = 0; r < rows; ++r) {
    float check = 0;
    for (int64_t d = 0; d < packed.dim; ++d) {
      const float value = r < count && d < packed.width ? x[r * packed.width + d] - packed.mean[d] : 0.f;
      tile[d * rows + r] = value;
      check += value * 0.f;
    }
    broken[r] = !(check == 0.f);
  }
}

// Searches rows of one block: x [count][width] to ids [count].
void search_block(const float* x, int64_t count, const Packed& packed, int64_t* ids, float* tiles) {
  const SearchTable& isa = search();
  const int64_t num_tiles = (count + isa.rows - 1) / isa.rows, tile_floats = packed.dim * isa.rows;
  std::vector<float> best(num_tiles * isa.rows, LOWEST);
  std::vector<int32_t> where(num_tiles * isa.rows, 0);
  std::unique_ptr<bool[]> broken(new bool[num_tiles * isa.rows]);
  for (int64_t t = 0; t < num_tiles; ++t)
    pack_tile(x + t * isa.rows * packed.width, std::min<int64_t>(isa.rows, count - t * isa.rows), packed, isa.rows,
              tiles + t * tile_floats, broken.get() + t * isa.rows);
  const int64_t step = packed.panels_per_block();
  for (int64_t first = 0; first < packed.panels; first += step)
    for (int64_t t = 0; t < num_tiles; ++t)
      isa.scan(tiles + t * tile_floats, packed.codes, packed.bias, packed.dim, first, std::min(packed.panels, first + step),
               best.data() + t * isa.rows, where.data() + t * isa.rows);
  for (int64_t n = 0; n < count; ++n) {
    const float* panel = packed.codes + where[n] * packed.dim * PANEL;
    const float* row = tiles + n / isa.rows * tile_floats + n % isa.rows;
    const int64_t code = broken[n] ? 0
                                   : where[n] * PANEL + isa.resolve(row, isa.rows, panel, packed.bias + where[n] * PANEL,
                                                                    packed.dim, best[n]);
    ids[n] = code;
  }
}

// Rows of a block: as many tiles as fit the cache, and blocks enough that the threads share them evenly.
int64_t rows_per_block(int64_t count, int64_t dim) {
  const int64_t rows = search().rows, threads = torch::stable::get_num_threads();
  const int64_t tiles = (count + rows - 1) / rows;
  const int64_t fitting = std::clamp<int64_t>(ROW_BLOCK_BYTES / (dim * rows * 4), 1, 64);
  const int64_t rounds = (tiles + fitting * threads - 1) / (fitting * threads);
  return (tiles + rounds * threads - 1) / (rounds * threads) * rows;
}

// A few rows: the threads share the codes instead, and the best of their answers is taken in order.
void search_few(const float* x, int64_t count, const Packed& packed, int64_t* ids) {
  Buffer rows = buffer(count * packed.dim);
  std::vector<bool> broken(count);
  for (int64_t n = 0; n < count; ++n) {
    float check = 0;
    for (int64_t d = 0; d < packed.dim; ++d) {
      const float value = d < packed.width ? x[n * packed.width + d] - packed.mean[d] : 0.f;
      rows[n * packed.dim + d] = value;
      check += value * 0.f;
    }
    broken[n] = !(check == 0.f);
  }
  const int64_t work = packed.panels * PANEL * packed.dim * count;
  const int64_t parts = std::clamp<int64_t>(work >> 16, 1, std::min<int64_t>(torch::stable::get_num_threads(), packed.panels));
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

// Calls done(first row, rows) for every block of rows, in parallel, once its ids are known.
template <class Done>
void search_all(const float* x, int64_t count, const Packed& packed, int64_t* ids, const Done& done) {
  if (!count) return;
  if (count <= FEW_ROWS) {
    search_few(x, count, packed, ids);
    return done(0, count);
  }
  const int64_t step = rows_per_block(count, packed.dim);
  parallel((count + step - 1) / step, [&](int64_t block) {
    const int64_t first = block * step, rows = std::min(step, count - first);
    Buffer tiles = buffer((rows + search().rows - 1) / search().rows * search().rows * packed.dim);
    search_block(x + first * packed.width, rows, packed, ids + first, tiles.get());
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

// The entry of each row into out, and the sum of squared differences in blocks of fixed size, so that the order of the
// summation does not depend on the threads.
constexpr int64_t LOSS_ROWS = 8;

void gather(const float* x, const int64_t* ids, int64_t first, int64_t rows, const float* codebook, int64_t width, float* out,
            double* errors) {
  for (int64_t n = first; n < first + rows; ++n) {
    const float* entry = codebook + ids[n] * width;
    float sums[LOSS_ROWS] = {};
    for (int64_t d = 0; d < width; ++d) {
      const float value = entry[d], difference = value - x[n * width + d];
      out[n * width + d] = value;
      sums[d % LOSS_ROWS] += difference * difference;
    }
    double sum = 0;
    for (const float part : sums) sum += part;
    errors[n] = sum;
  }
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& x, const Tensor& packed, const Tensor& codebook) {
  const int64_t count = x.size(0), width = x.size(1);
  Tensor ids = make(x, {count}, ScalarType::Long), out = make(x, {count, width}, ScalarType::Float);
  Tensor loss = make(x, {}, ScalarType::Float);
  std::vector<double> errors(count);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* vectors = static_cast<float*>(out.mutable_data_ptr());
  search_all(floats(x), count, view(packed, codebook.size(0), width), id, [&](int64_t first, int64_t rows) {
    gather(floats(x), id, first, rows, floats(codebook), width, vectors, errors.data());
  });
  double total = 0;
  for (const double error : errors) total += error;
  *static_cast<float*>(loss.mutable_data_ptr()) = count ? static_cast<float>(total / static_cast<double>(count * width)) : 0.f;
  return {ids, out, loss};
}

// Rows sorted by code (a counting sort keeps their order), then each code's rows summed by one thread.
std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& ids, int64_t size) {
  const int64_t count = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(ids.numel() == count, "expected ", count, " ids, got ", ids.numel());
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  Tensor counts = make(x, {size}, ScalarType::Float), sums = make(x, {size, width}, ScalarType::Float);
  std::vector<int64_t> start(size + 1);
  for (int64_t n = 0; n < count; ++n) {
    STD_TORCH_CHECK(id[n] >= 0 && id[n] < size, "expected ids in [0, ", size, "), got ", id[n]);
    ++start[id[n] + 1];
  }
  for (int64_t k = 0; k < size; ++k) start[k + 1] += start[k];
  std::vector<int64_t> order(count), next(start.begin(), start.end() - 1);
  for (int64_t n = 0; n < count; ++n) order[next[id[n]]++] = n;
  float *number = static_cast<float*>(counts.mutable_data_ptr()), *total = static_cast<float*>(sums.mutable_data_ptr());
  const float* rows = floats(x);
  const int64_t step = std::max<int64_t>(64, size / 64);
  parallel((size + step - 1) / step, [&](int64_t block) {
    for (int64_t k = block * step; k < std::min(size, (block + 1) * step); ++k) {
      number[k] = static_cast<float>(start[k + 1] - start[k]);
      std::fill_n(total + k * width, width, 0.f);
      for (int64_t i = start[k]; i < start[k + 1]; ++i)
        for (int64_t d = 0; d < width; ++d) total[k * width + d] += rows[order[i] * width + d];
    }
  });
  return {counts, sums};
}

// Every stage quantizes what the stages before it left over; a block of rows stays in the cache for all of them.
std::tuple<Tensor, Tensor> residual_quantize(const Tensor& x, const std::vector<Tensor>& packed, const Tensor& codebooks) {
  const int64_t count = x.size(0), width = x.size(1), stages = codebooks.size(0), size = codebooks.size(1);
  Tensor ids = make(x, {count, stages}, ScalarType::Long), out = make(x, {count, width}, ScalarType::Float);
  int64_t* id = static_cast<int64_t*>(ids.mutable_data_ptr());
  float* vectors = static_cast<float*>(out.mutable_data_ptr());
  if (!count) return {ids, out};
  const int64_t step = rows_per_block(count, padded(width));
  parallel((count + step - 1) / step, [&](int64_t block) {
    const int64_t first = block * step, rows = std::min(step, count - first);
    Buffer residual = buffer(rows * width);
    Buffer tiles = buffer((rows + search().rows - 1) / search().rows * search().rows * padded(width));
    std::vector<int64_t> found(rows);
    std::memcpy(residual.get(), floats(x) + first * width, rows * width * sizeof(float));
    std::fill_n(vectors + first * width, rows * width, 0.f);
    for (int64_t stage = 0; stage < stages; ++stage) {
      search_block(residual.get(), rows, view(packed[stage], size, width), found.data(), tiles.get());
      const float* codebook = floats(codebooks) + stage * size * width;
      for (int64_t n = 0; n < rows; ++n) {
        id[(first + n) * stages + stage] = found[n];
        const float* entry = codebook + found[n] * width;
        for (int64_t d = 0; d < width; ++d) {
          residual[n * width + d] -= entry[d];
          vectors[(first + n) * width + d] += entry[d];
        }
      }
    }
  });
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
  m.def("code_sums(Tensor x, Tensor ids, int size) -> (Tensor, Tensor)");
  m.def("residual_quantize(Tensor x, Tensor[] packed, Tensor codebooks) -> (Tensor, Tensor)");
  m.def("fsq(Tensor x, Tensor thresholds, Tensor scale, Tensor shift, Tensor basis) -> (Tensor, Tensor)");
  m.def("lfq(Tensor x, float scale) -> (Tensor, Tensor)");
  m.def("instruction_set() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("code_sums", TORCH_BOX(&code_sums));
  m.impl("residual_quantize", TORCH_BOX(&residual_quantize));
  m.impl("fsq", TORCH_BOX(&fsq));
  m.impl("lfq", TORCH_BOX(&lfq));
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace tokenzoo
