// Equal-information windows: bytes to window codes and back. Integers alone, so that every machine agrees.
//
// A window is an interval of points [low, low + range) that every byte narrows, bit by bit; its code is the first point.
// What each step computes is said in tokenzoo/kernels/windows.py, which has the same in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace tokenzoo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Points = unsigned __int128;

constexpr uint64_t MULTIPLIER = 0x9E3779B97F4A7C15;
constexpr int TOKEN_BITS = 16;
constexpr int LINEAR = 8;  // children that are looked through one by one

template <class T>
const T* data(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }

template <class T>
Tensor copied(const Tensor& like, const std::vector<T>& values, ScalarType type) {
  const int64_t size[1] = {static_cast<int64_t>(values.size())};
  Tensor out = torch::stable::new_empty(like, {size, 1}, type);
  if (!values.empty()) std::memcpy(out.mutable_data_ptr(), values.data(), values.size() * sizeof(T));
  return out;
}

// The longest string of a trie at each place, one behind the other; node 0 is the root, whose children are all 256 bytes.
Tensor match_strings(const Tensor& text, const Tensor& first, const Tensor& labels, const Tensor& children) {
  const uint8_t *bytes = data<uint8_t>(text), *label = data<uint8_t>(labels);
  const int32_t *start = data<int32_t>(first), *child = data<int32_t>(children);
  const int64_t count = text.size(0);
  std::vector<int64_t> found;
  found.reserve(count / 3 + 1);
  for (int64_t at = 0; at < count;) {
    int32_t node = child[bytes[at++]];
    for (; at < count; ++at) {
      const uint8_t *begin = label + start[node], *end = label + start[node + 1];
      const uint8_t* place = begin;
      if (end - begin <= LINEAR)
        while (place < end && *place < bytes[at]) ++place;
      else
        place = std::lower_bound(begin, end, bytes[at]);
      if (place == end || *place != bytes[at]) break;
      node = child[place - label];
    }
    found.push_back(node);
  }
  return copied(text, found, ScalarType::Long);
}

// The byte model of tokenzoo/tokenizers/text/_byte_model.py.
struct Model {
  const int8_t* corrections;
  const uint8_t* checks;
  const int32_t* odds;
  int64_t limit;
  int orders, hashed_bits;

  // Probability of a one, in 1/65536, behind `known` bytes (the last one lowest in `context`) and the bits in `node`.
  int64_t one(uint64_t context, int64_t known, uint64_t node) const {
    int64_t sum = corrections[node];
    if (orders > 1 && known > 0) sum += corrections[256 + ((context & 255) << 8 | node)];
    const int8_t* table = corrections + 256 + 65536;
    const uint8_t* check = checks;
    for (int order = 2; order < orders && order <= known; ++order) {
      const uint64_t last = context & ((uint64_t{1} << 8 * order) - 1);
      const uint64_t hash = (last << 8 | node) * MULTIPLIER;
      const uint64_t place = hash >> (64 - hashed_bits);
      if (check[place] == (hash >> (56 - hashed_bits) & 255)) sum += table[place];
      table += uint64_t{1} << hashed_bits, check += uint64_t{1} << hashed_bits;
    }
    return odds[std::clamp(sum, -limit, limit) + limit];
  }
};

// Points are whole with the Delay rule; the greedy rule divides each into 2^16 parts, as an arithmetic coder of real numbers.
constexpr int PARTS = 16;

struct Window {
  Points low = 0, range;
  uint64_t context = 0;
  int64_t known = 0;
  bool greedy;

  Window(int64_t bits, bool greedy) : greedy(greedy) {
    range = greedy ? Points{1} << (bits + PARTS) : ~Points{0} >> (128 - bits);
    low = !greedy;
  }

  // What the branch of ones gets; of a window's first byte, every value keeps at least one whole point.
  Points ones(int64_t one, int depth) const {
    const int64_t rare = std::min(one, 65536 - one);
    Points share = (range >> 16) * rare + ((range & 65535) * rare >> 16);
    if (one > 32768) share = range - share;
    if (known) return share;
    const Points least = Points{1} << (7 - depth + (greedy ? PARTS + 1 : 0));
    return std::clamp(share, least, range - least);
  }

  void take(int bit, Points share) {
    low += bit ? range - share : 0;
    range = bit ? share : range - share;
  }

  // The first whole point.
  Points code() const { return greedy ? (low + 65535) >> PARTS : low; }

  // Whether a whole point is left.
  bool open() const { return greedy ? (low + range) >> PARTS > code() : range > 0; }

  // A string is complete: with the Delay rule it owns its first point, and longer strings share the rest.
  void finish(uint8_t byte) {
    context = context << 8 | byte, ++known;
    if (!greedy) ++low, --range;
  }
};

Model model(const Tensor& corrections, const Tensor& checks, const Tensor& odds, int64_t orders, int64_t hashed_bits) {
  return {data<int8_t>(corrections), data<uint8_t>(checks), data<int32_t>(odds), (odds.size(0) - 1) / 2,
          static_cast<int>(orders), static_cast<int>(hashed_bits)};
}

Tensor encode_windows(const Tensor& text, const Tensor& corrections, const Tensor& checks, const Tensor& odds, int64_t orders,
                      int64_t hashed_bits, int64_t bits, bool greedy) {
  const Model says = model(corrections, checks, odds, orders, hashed_bits);
  const uint8_t* bytes = data<uint8_t>(text);
  const int64_t count = text.size(0);
  std::vector<int64_t> ids;
  ids.reserve(count / 3 + 8);
  for (int64_t at = 0; at < count;) {
    Window window(bits, greedy);
    Points code = 0;
    for (; at < count && window.range; ++at) {
      uint64_t node = 1;
      for (int depth = 0; depth < 8 && window.range; ++depth) {
        const int bit = bytes[at] >> (7 - depth) & 1;
        window.take(bit, window.ones(says.one(window.context, window.known, node), depth));
        node = node << 1 | bit;
      }
      if (!window.open()) break;
      code = window.code();
      window.finish(bytes[at]);
    }
    for (int64_t shift = bits - TOKEN_BITS; shift >= 0; shift -= TOKEN_BITS)
      ids.push_back(static_cast<int64_t>(code >> shift) & 65535);
  }
  return copied(text, ids, ScalarType::Long);
}

std::tuple<Tensor, Tensor> decode_windows(const Tensor& ids, const Tensor& corrections, const Tensor& checks, const Tensor& odds, int64_t orders,
                      int64_t hashed_bits, int64_t bits, bool greedy) {
  const Model says = model(corrections, checks, odds, orders, hashed_bits);
  const int64_t* token = data<int64_t>(ids);
  const int64_t count = ids.size(0), width = bits / TOKEN_BITS;
  std::vector<uint8_t> text;
  std::vector<int64_t> lengths;
  text.reserve(count * 4);
  for (int64_t at = 0; at + width <= count; at += width) {
    Points code = 0;
    for (int64_t i = 0; i < width; ++i) code = code << TOKEN_BITS | static_cast<uint64_t>(token[at + i]);
    Window window(bits, greedy);
    const Points point = greedy ? code << PARTS : code;
    const size_t begin = text.size();
    size_t end = begin;
    while (window.range && point >= window.low && point - window.low < window.range) {
      uint64_t node = 1;
      for (int depth = 0; depth < 8; ++depth) {
        const Points share = window.ones(says.one(window.context, window.known, node), depth);
        const int bit = point - window.low >= window.range - share;
        window.take(bit, share);
        node = node << 1 | bit;
      }
      if (!window.open()) break;
      text.push_back(static_cast<uint8_t>(node));
      if (window.code() == code) end = text.size();
      window.finish(static_cast<uint8_t>(node));
    }
    text.resize(end);
    lengths.push_back(static_cast<int64_t>(end - begin));
  }
  return {copied(ids, text, ScalarType::Byte), copied(ids, lengths, ScalarType::Long)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenzoo_native, m) {
  m.def("match_strings(Tensor text, Tensor first, Tensor labels, Tensor children) -> Tensor");
  m.def("encode_windows(Tensor text, Tensor corrections, Tensor checks, Tensor odds, int orders, int hashed_bits, int bits, "
        "bool greedy) -> Tensor");
  m.def("decode_windows(Tensor ids, Tensor corrections, Tensor checks, Tensor odds, int orders, int hashed_bits, int bits, "
        "bool greedy) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CPU, m) {
  m.impl("match_strings", TORCH_BOX(&match_strings));
  m.impl("encode_windows", TORCH_BOX(&encode_windows));
  m.impl("decode_windows", TORCH_BOX(&decode_windows));
}

}  // namespace tokenzoo
