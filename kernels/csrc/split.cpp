// Splitting bytes into words, in one pass: by a table of bytes, or by an automaton over classes of characters.
//
// Both are told their rule by the caller; see kernels/ops/split_words.py for what they compute.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace tokenzoo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 4096;
constexpr int64_t PAGE = 128;

bool continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// The ends of words, where words longer than `most` bytes (0: any) are cut, between characters if one begins within reach.
struct Words {
  const uint8_t* data;
  int64_t most;
  int64_t start = 0;
  std::vector<int64_t> ends{};

  void end(int64_t at) {
    while (most && at - start > most) ends.push_back(start = cut(start + most));
    if (at > start) ends.push_back(start = at);
  }
  int64_t cut(int64_t at) const {
    int64_t back = at;
    while (back > at - 3 && back > start + 1 && continues(data[back])) --back;
    return continues(data[back]) ? at : back;
  }
  Tensor tensor(const Tensor& like) const {
    const int64_t size[] = {static_cast<int64_t>(ends.size())};
    Tensor out = torch::stable::new_empty(like, {size, 1}, ScalarType::Long);
    if (!ends.empty()) std::memcpy(out.mutable_data_ptr(), ends.data(), ends.size() * sizeof(int64_t));
    return out;
  }
};

const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

// A word ends after a byte that the table marks, where the byte before it is not marked.
Tensor split_bytes(const Tensor& data, const Tensor& marked, int64_t most) {
  const int64_t count = data.numel();
  const uint8_t *d = bytes(data), *table = bytes(marked);
  STD_TORCH_CHECK(marked.numel() == 256, "expected a table of 256 bytes, got ", marked.numel());
  Words words{d, most};
  int64_t found[BLOCK];
  uint8_t before = 0;
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t last = std::min(count, first + BLOCK);
    int64_t ends = 0;
    for (int64_t i = first; i < last; ++i) {
      const uint8_t here = table[d[i]];
      found[ends] = i + 1;
      ends += here & ~before;
      before = here;
    }
    if (most)
      for (int64_t i = 0; i < ends; ++i) words.end(found[i]);
    else
      words.ends.insert(words.ends.end(), found, found + ends);
    if (!words.ends.empty()) words.start = words.ends.back();
  }
  words.end(count);
  return words.tensor(data);
}

// The character that begins at `at`: its length in bytes and code point; length 0 if none does (one byte is broken), -1 if
// the data ends within it. Well-formed as Unicode's table 3-7 has it.
struct Character {
  int length;
  uint32_t code;
};

Character read(const uint8_t* data, int64_t at, int64_t count) {
  const uint8_t lead = data[at];
  if (lead < 0xC2 || lead > 0xF4) return {0, 0};
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  uint32_t code = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) {
    if (at + i == count) return {-1, 0};
    const uint8_t byte = data[at + i];
    if (i == 1 ? byte < low || byte > high : !continues(byte)) return {0, 0};
    code = code << 6 | (byte & 0x3F);
  }
  return {length, code};
}

// An automaton [states, classes] over the classes of characters; an entry is 2 * next state + whether a word begins here.
// The class of code point c is classes[pages[c / 128] * 128 + c % 128]; a byte of no character has the class `broken`.
Tensor split_characters(const Tensor& data, const Tensor& pages, const Tensor& classes, const Tensor& automaton, int64_t broken,
                        int64_t most) {
  const int64_t count = data.numel(), width = automaton.size(1);
  const uint8_t *d = bytes(data), *page = bytes(pages), *table = bytes(classes);
  const uint16_t* entries = static_cast<const uint16_t*>(automaton.const_data_ptr());
  STD_TORCH_CHECK(pages.numel() * PAGE == 0x110000, "expected a page for each ", PAGE, " code points, got ", pages.numel());
  STD_TORCH_CHECK(broken >= 0 && broken < width, "expected a class in [0, ", width, "), got ", broken);
  const uint8_t* ascii = table + page[0] * PAGE;
  Words words{d, most};
  words.ends.reserve(count / 8);
  uint32_t state = 0;
  for (int64_t at = 0; at < count;) {
    int64_t step = 1;
    uint32_t kind = ascii[d[at] & 0x7F];
    if (d[at] >= 0x80) {
      const Character found = read(d, at, count);
      if (found.length < 0) break;  // it belongs to the last word until more is known
      kind = found.length ? table[page[found.code / PAGE] * PAGE + found.code % PAGE] : static_cast<uint32_t>(broken);
      step = std::max(1, found.length);
    }
    const uint32_t entry = entries[state * width + kind];
    if (entry & 1) words.end(at);
    state = entry >> 1;
    at += step;
  }
  words.end(count);
  return words.tensor(data);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenzoo_native, m) {
  m.def("split_bytes(Tensor data, Tensor marked, int most) -> Tensor");
  m.def("split_characters(Tensor data, Tensor pages, Tensor classes, Tensor automaton, int broken, int most) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CPU, m) {
  m.impl("split_bytes", TORCH_BOX(&split_bytes));
  m.impl("split_characters", TORCH_BOX(&split_characters));
}

}  // namespace tokenzoo
